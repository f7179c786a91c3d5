"""Emoji, flat and 3D, 32 x 32 pixels, drawn in one pass of the network: learned from a trained model of emoji.

    uv run train.py --config=configs/emoji.py --config.data.source=DIR --config.data.image_size=32 --config.train.steps=3600
    uv run train.py --config=configs/emoji_onestep.py --config.data.source=DIR

The second begins with the weights of the first, runs/emoji. One core of two, the other busy: 36 minutes and 14. Of 32 training
names drawn by lot, in one pass each, 12 can be told at sight, where the teacher's 25 steps draw 16 (benchmarks/RESULTS.md).
From the pictures alone, without a teacher: --config.family.teacher= --config.train.init_from=none
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.onestep import OneStep
from jaxgen.families.unet import UNet
from jaxgen.text.config import TextConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=OneStep(
            network=UNet(patch=4, widths=(96, 192), down=(1, 2), up=(2, 2), head_dim=32),
            teacher="runs/emoji",
            guidance=(1.0, 3.0),
        ),
        data=DataConfig(name="emoji", image_size=32, skin_tones=False),
        text=TextConfig(dropout=0.0),  # the teacher knows the empty caption, and a pupil without one leaves out its own share
        train=TrainConfig(steps=1500, batch_size=32, ema_decay=0.999, checkpoint_every=500, init_from="runs/emoji"),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(
            prompts=(
                "a flat emoji of red apple",
                "a 3D emoji of red apple",
                "a flat emoji of dog face",
                "a 3D emoji of grinning face",
                "a flat emoji of rocket",
                "a 3D emoji of rocket",
                "a flat emoji of pizza",
                "a 3D emoji of sunflower",
            ),
            num_images=4,
            num_steps=1,
            guidance_scale=2.0,
            every=500,
        ),
        eval=EvalConfig(every=500),
    )
