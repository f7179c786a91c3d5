"""Emoji, flat and 3D, from their names and keywords, 32 x 32 pixels, by a GAN: one pass of the network a picture.

    uv run train.py --config=configs/emoji_gan.py --config.data.source=DIR

DIR holds noto_emoji/ and fluent_emoji_3d/, each with pictures and a captions.jsonl. One core of two, the other busy:
43 minutes. Of 32 training names drawn by lot one can be told at sight; faces are faces and buttons are buttons, but not which
ones: the rate fell while it was still learning (benchmarks/RESULTS.md).
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.gan import Gan
from jaxgen.families.gan_networks import Residual
from jaxgen.text.config import TextConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        # Blocks of 2 x 2 pixels: in 4 x 4, for half the arithmetic, pictures stayed full of grain.
        family=Gan(
            network=Residual(),
            r1=0.2,
            r2=0.2,
            augment=("colour", "translation", "cutout"),  # some 3,000 pictures
        ),
        data=DataConfig(name="emoji", image_size=32, skin_tones=False),
        text=TextConfig(dropout=0.0),  # guidance, which needs the empty caption, means nothing here
        train=TrainConfig(steps=5_000, batch_size=16, ema_decay=0.998, checkpoint_every=500),
        # Little momentum: what the other player does is old by the next step.
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-3,
            schedule="trapezoid",
            warmup_steps=100,
            momentum=0.5,
            b1=0.0,
            b2=0.99,
            weight_decay=0.0,
            clip_norm=10.0,
        ),
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
            every=500,
        ),
        eval=EvalConfig(every=500, diversity=32),
    )
