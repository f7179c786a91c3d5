"""Scenes in minutes on a laptop's CPU.

    uv run train.py
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(network=UNet(widths=(48, 128), down=(1, 2), up=(2, 2)), time_mean=0.4),
        data=DataConfig(name="scenes", train_examples=20_000, paraphrases=0),
        train=TrainConfig(steps=800, batch_size=64, ema_decay=0.998, checkpoint_every=200),
        optimizer=OptimizerConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
        sample=SampleConfig(
            prompts=(
                "a large red circle above a small blue square",
                "a small green triangle to the left of a large yellow ring",
                "three small orange diamonds",
                "a large purple cross",
            ),
            num_images=4,
            every=400,
        ),
    )
