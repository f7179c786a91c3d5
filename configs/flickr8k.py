"""Flickr8k's photographs from their captions, 64 x 64 pixels; the data set is for research only.

    uv run train.py --config=configs/flickr8k.py --config.data.source=DIR

DIR is the unpacked data set as published. Two CPU cores beside other work, 79 minutes (56 images/s while alone, which would
make 57): loss on `validation` 0.149, 0.143, 0.140, 0.138 every 1,500 steps, still falling. Eight thousand pictures seen 27
times teach the colours and the layouts of scenes (grass, sea, snow, a street at night), not objects: dogs and people are
smudges in the right place.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(
            network=UNet(patch=4, widths=(96, 192), down=(1, 2), up=(2, 2), head_dim=32, dropout=0.1),
            time_mean=0.4,
            sample_shift=3.0,
        ),
        data=DataConfig(name="flickr8k", image_size=64),
        train=TrainConfig(steps=6000, batch_size=32, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(
            prompts=(
                "a dog runs through the grass",
                "a child in a red shirt",
                "a man surfing on a wave",
                "people on a street at night",
                "a snowboarder in the snow",
                "two dogs on the beach",
            ),
            num_images=4,
            num_steps=25,
            guidance_scale=3.0,
            sampler="euler",
            every=1500,
        ),
        eval=EvalConfig(every=1500, patience=3),
    )
