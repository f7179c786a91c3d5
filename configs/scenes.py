"""Scenes of coloured shapes: the model that ships with the package.

    uv run train.py --config=configs/scenes.py

Two CPU cores, 65 minutes. Drawn exactly, of 1,000 captions and three seeds each: `test` 92.9%, pairs of colour and shape never
seen together 94.1%, held-out words in a held-out sentence 71.8% (python benchmarks/accuracy.py).
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(network=UNet(widths=(64, 128), down=(1, 2), up=(2, 2)), time_mean=0.4, sample_shift=3.0),
        data=DataConfig(name="scenes", train_examples=60_000, paraphrases=1),
        train=TrainConfig(steps=11_000, batch_size=32, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(
            prompts=(
                "a large red circle above a small blue square",
                "a small green triangle to the left of a large yellow ring",
                "three small orange diamonds",
                "a large purple cross",
            ),
            num_images=4,
            num_steps=16,
            guidance_scale=1.5,
            sampler="euler",
            every=2500,
        ),
        eval=EvalConfig(every=2500, count=256, metric="eval/exact"),
    )
