"""Scenes drawn in the latents of an autoencoder, which is trained first.

    uv run train.py --config=configs/scenes_autoencoder.py --workdir=runs/scenes_autoencoder
    uv run train.py --config=configs/scenes_latent.py

One CPU core of two, the other busy, 1 h 37 min after the autoencoder's 13 (32 images/s), and it was still learning fast: drawn
exactly, of 1,000 captions of `test` and three seeds each, 85.4%. Single objects are right in 97.3%, two in a relation in 88.1%,
several of a kind in 66.5%.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.codec import Pretrained
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(
            codec=Pretrained("runs/scenes_autoencoder"),
            network=UNet(patch=1, widths=(128,), down=(3,), up=(3,), attention=("joint",)),
        ),
        data=DataConfig(name="scenes", train_examples=60_000, paraphrases=1),
        train=TrainConfig(steps=5_000, batch_size=32, ema_decay=0.999, checkpoint_every=500),
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
