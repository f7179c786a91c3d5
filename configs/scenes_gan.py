"""Scenes of coloured shapes by a GAN: one pass of the network a picture.

    uv run train.py --config=configs/scenes_gan.py

One of two CPU cores, the other busy, 1 h 47 min (0.45 s a step): this is the model that ships as `gan`. Drawn exactly in one
pass, of 1,000 captions and three seeds each: `test` 89.5%, pairs of colour and shape never seen together 82.3%, held-out words
in a held-out sentence 56.5%. Colours are right in 99.4%, shapes in 94.3%, how two objects stand to each other in 96.5%.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.gan import Gan
from jaxgen.families.gan_networks import Residual
from jaxgen.text.config import TextConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Gan(network=Residual(), r1=0.1, r2=0.1),
        data=DataConfig(name="scenes", train_examples=60_000, paraphrases=1),
        text=TextConfig(dropout=0.0),  # guidance, which needs the empty caption, means nothing here
        train=TrainConfig(steps=10_500, batch_size=16, ema_decay=0.998, checkpoint_every=500),
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
                "a large red circle above a small blue square",
                "a small green triangle to the left of a large yellow ring",
                "three small orange diamonds",
                "a large purple cross",
            ),
            num_images=4,
            every=1000,
        ),
        eval=EvalConfig(every=1000, count=256, diversity=32, metric="eval/exact"),
    )
