"""Emoji, flat and 3D, from their names and keywords, 32 x 32 pixels, by a variational autoencoder: one pass a picture.

    uv run train.py --config=configs/emoji_vae.py --config.data.source=DIR

DIR holds noto_emoji/ and fluent_emoji_3d/, each with pictures and a captions.jsonl. One core of two, the other busy:
29 minutes. Of 32 training names drawn by lot 26 can be told at sight (benchmarks/RESULTS.md); it knows them by heart: on
names never seen the loss is least at its first evaluation.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.vae import Vae
from jaxgen.families.vae_networks import Ladder
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Vae(
            # Blocks of 4 x 4 pixels. Unlike a scene, an emoji is one thing in the middle: a finer group, at 2 x 2 positions,
            # may say how it is painted.
            network=Ladder(
                strides=(4, 2, 2, 2),
                widths=(96, 128, 96, 128),
                down=(1, 1, 1, 1),
                up=(2, 2, 2, 4),
                groups=(0, 0, 1, 4),
                attention=("none", "joint", "joint", "text"),
            ),
            loss_min_scale=0.3,
            free_bits=4.0,
        ),
        data=DataConfig(name="emoji", image_size=32, skin_tones=False),
        train=TrainConfig(steps=6_000, batch_size=32, ema_decay=0.999, checkpoint_every=500),
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
            guidance_scale=1.0,
            temperature=0.7,
            every=1000,
        ),
        eval=EvalConfig(every=1000),
    )
