"""Emoji, flat and 3D, from their names and keywords, 64 x 64 pixels.

    uv run train.py --config=configs/emoji.py --config.data.source=DIR

DIR holds noto_emoji/ and fluent_emoji_3d/, each with pictures and a captions.jsonl.

Two CPU cores beside other work, 112 minutes (60 images/s while alone, which would make 67): loss on names never seen 0.095 at
its least, 0.104 at the end. Of 32 training names drawn by lot, one picture each, 18 can be told at sight (docs/emoji.png); of
eight names never seen, three. benchmarks/RESULTS.md names them. At 32 x 32 pixels, a third of the work,
--config.data.image_size=32 --config.train.steps=3600: one core of two, the other busy, 76 minutes, 16 of the same 32.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        # Blocks of 4 x 4 pixels: as many positions as scenes have, so that a CPU can train it too.
        family=Flow(
            network=UNet(patch=4, widths=(96, 192), down=(1, 2), up=(2, 2), head_dim=32),
            time_mean=0.4,
            sample_shift=3.0,
        ),
        data=DataConfig(name="emoji", image_size=64, skin_tones=False),
        train=TrainConfig(steps=7500, batch_size=32, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
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
            num_steps=25,
            guidance_scale=2.0,
            sampler="euler",
            every=1500,
        ),
        eval=EvalConfig(every=1500),
    )
