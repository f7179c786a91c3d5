"""Scenes of coloured shapes, drawn in one pass of the network: distilled from a flow, then trained on as a GAN.

After configs/scenes_dmd.py, whose generator this one begins with, and configs/scenes_gan.py, whose discriminator:

    uv run train.py --config=configs/scenes_adversarial.py

One of two CPU cores (AMD EPYC), the other busy, 1 h 27 min (0.46 s a step). It began with a generator of 64.0%. Drawn exactly
in one pass, of 1,000 captions and three seeds each: `test` 85.8%, pairs of colour and shape never seen together 86.1%, held-out
words in a held-out sentence 57.8%. Then once more, a block at the full resolution being moved behind where noise has become
places:

    uv run train.py --config=configs/scenes_adversarial.py --workdir=runs/scenes_second \
        --config.train.init_from=runs/scenes_adversarial --config.train.init_skip=generator/up/0/1 \
        --config.family.network.down=0,2 --config.family.network.up=2,1 \
        --config.optimizer.learning_rate=1e-3 --config.train.steps=7000 --config.sample.temperature=0.7

As before, 1 h: this is the model that ships as `onestep`. `test` 87.9%, never seen together 89.1%, held-out words 61.8%.
Colours are right in 99.5%, shapes in 92.5%, how two objects stand to each other in 96.3%.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.adversarial import Adversarial
from jaxgen.families.unet import UNet
from jaxgen.text.config import TextConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        # As configs/scenes_dmd.py has them.
        family=Adversarial(network=UNet(widths=(64, 128), down=(1, 2), up=(1, 1), refiner=1), guidance=(1.5, 1.5)),
        data=DataConfig(name="scenes", train_examples=60_000, paraphrases=1),
        text=TextConfig(dropout=0.0),  # guidance means nothing here
        train=TrainConfig(
            steps=11_000, batch_size=16, ema_decay=0.998, checkpoint_every=500, init_from="runs/scenes_dmd,runs/scenes_gan"
        ),
        # Little momentum: what the other player does is old by the next step.
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=5e-4,
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
            num_steps=1,
            guidance_scale=1.5,
            every=500,
        ),
        eval=EvalConfig(every=500, count=256, diversity=32, metric="eval/exact"),
    )
