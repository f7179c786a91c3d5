"""Scenes of coloured shapes, drawn in one pass of the network: learned from the model that ships with the package.

    uv run train.py --config=configs/scenes_onestep.py

The whole of it is not yet measured. With --config.train.steps=8000, on one CPU core beside other work, 3 h 45 min in steps:
53.3% of `test` drawn exactly in one step (1,000 captions, three seeds), colours right in 95.8%.

From the pictures alone, without a teacher:
--config.family.teacher= --config.train.init_from=none
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.onestep import OneStep
from jaxgen.families.unet import UNet
from jaxgen.text.config import TextConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        # Of the teacher's blocks those that two million parameters allow; they begin with its weights.
        family=OneStep(
            network=UNet(widths=(64, 128), down=(1, 2), up=(1, 1), refiner=1),
            teacher="flow",
            guidance=(1.0, 2.0),
        ),
        data=DataConfig(name="scenes", train_examples=60_000, paraphrases=1),
        text=TextConfig(dropout=0.0),  # the teacher knows the empty caption, and a pupil without one leaves out its own share
        train=TrainConfig(steps=12_000, batch_size=32, ema_decay=0.999, checkpoint_every=500, init_from="flow"),
        optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(
            prompts=(
                "a large red circle above a small blue square",
                "a small green triangle to the left of a large yellow ring",
                "three small orange diamonds",
                "a large purple cross",
            ),
            num_images=4,
            num_steps=1,
            guidance_scale=1.5,
            every=2500,
        ),
        eval=EvalConfig(every=2500, count=256, metric="eval/exact"),
    )
