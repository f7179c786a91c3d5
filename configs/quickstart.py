"""Scenes in minutes on a laptop's CPU.

uv run train.py
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        # Whether a shape comes out whole is decided while much noise is left: both the times drawn in training and the
        # sampler's steps lean that way, and the loss does not count the last, easy steps many times over.
        family=Flow(network=UNet(widths=(48, 128), down=(1, 2), up=(2, 2)), loss="clean", time_mean=1.0, sample_shift=3.0),
        data=DataConfig(name="scenes", train_examples=20_000, paraphrases=0),
        train=TrainConfig(steps=3200, batch_size=16, ema_decay=0.998, checkpoint_every=800, log_every=100),
        optimizer=OptimizerConfig(name="adamw", learning_rate=2e-3, warmup_steps=50),
        sample=SampleConfig(
            prompts=(
                "a large red circle above a small blue square",
                "a small green triangle to the left of a large yellow ring",
                "three small orange diamonds",
                "a large purple cross",
            ),
            num_images=4,
            num_steps=25,
            guidance_scale=2.5,
            sampler="euler",
            every=1600,
        ),
    )
