"""Emoji, flat and 3D, from their names and keywords, 64 x 64 pixels.

    uv run train.py --config=configs/emoji.py --config.data.source=DIR

DIR holds noto_emoji/ and fluent_emoji_3d/, each with pictures and a captions.jsonl. Meant for one GPU; a CPU needs hours.
Not trained to its end yet: no time and no score to state.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(
            network=UNet(widths=(64, 128, 256), down=(1, 2, 2), up=(2, 2, 2), attention=("none", "text", "joint"), dropout=0.1),
            time_mean=0.4,
            sample_shift=3.0,
        ),
        data=DataConfig(name="emoji", image_size=64),
        train=TrainConfig(steps=20_000, batch_size=64, ema_decay=0.9995),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid"),
        sample=SampleConfig(
            prompts=(
                "a flat emoji of red apple",
                "a 3D emoji of dog face",
                "a 3D emoji of grinning face",
                "a flat emoji of rocket",
            ),
            num_images=4,
        ),
        eval=EvalConfig(every=2000),
    )
