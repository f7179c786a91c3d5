"""Scenes of coloured shapes by a variational autoencoder: a picture in one pass of a small network.

    uv run train.py --config=configs/scenes_vae.py

One of two CPU cores (AMD EPYC), the other busy, 1 h 17 min (0.25 s a step): this is the model that ships as `vae`. Drawn
exactly, of 1,000 captions and three seeds each: `test` 69.2%, pairs of colour and shape never seen together 69.1%, held-out
words in a held-out sentence 41.4%; without guidance, in one pass, 66.3%. Single objects are right in 86.3%, two in a relation
in 73.0%.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.vae import Vae
from jaxgen.families.vae_networks import Ladder
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Vae(
            # All latents belong to the picture as a whole, four groups that refine each other: with latents in several places
            # each place would decide for itself whether an object stands there.
            network=Ladder(
                strides=(2, 2, 2, 4),
                widths=(64, 96, 64, 96),
                down=(1, 1, 1, 1),
                up=(2, 2, 1, 4),
                groups=(0, 0, 0, 4),
                attention=("none", "joint", "joint", "text"),
            ),
            loss_min_scale=0.3,
            free_bits=4.0,
        ),
        data=DataConfig(name="scenes", train_examples=60_000, paraphrases=1),
        train=TrainConfig(steps=18_000, batch_size=32, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(
            prompts=(
                "a large red circle above a small blue square",
                "a small green triangle to the left of a large yellow ring",
                "three small orange diamonds",
                "a large purple cross",
            ),
            num_images=4,
            guidance_scale=2.0,
            temperature=0.85,
            every=1500,
        ),
        eval=EvalConfig(every=1500, count=256, metric="eval/exact"),
    )
