"""Flickr8k's photographs from their captions, 64 x 64 pixels; the data set is for research only.

    uv run train.py --config=configs/flickr8k.py --config.data.source=DIR

DIR is the unpacked data set as published. Meant for one GPU; eight thousand pictures teach colours and layouts of scenes,
not objects. Not trained to its end yet: no time and no score to state.
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
        data=DataConfig(name="flickr8k", image_size=64),
        train=TrainConfig(steps=20_000, batch_size=64, ema_decay=0.9995),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, schedule="trapezoid"),
        sample=SampleConfig(
            prompts=("a dog runs through the grass", "a child in a red shirt", "a man surfing on a wave", "people on a street"),
            num_images=4,
        ),
        eval=EvalConfig(every=2000, patience=4),
    )
