"""An autoencoder of scenes, in whose latents another family draws: 32 x 32 pixels into 8 x 8 x 4.

    uv run train.py --config=configs/scenes_autoencoder.py

One CPU core of two, the other busy, 13 min: of 500 `validation` pictures 99.8% are still judged exact after the way there and
back (95.8% after 1,000 steps, of which each takes 0.24 s).
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.autoencoder import KL, Autoencoder, Convolutional
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Autoencoder(
            # The posterior's noise costs about as much as an error of three levels of 256: what another family draws a little
            # beside a latent is decoded like it.
            network=Convolutional(widths=(32, 80), encoder_blocks=1, decoder_blocks=2, bottleneck=KL(channels=4, weight=1e-3))
        ),
        data=DataConfig(name="scenes", train_examples=60_000, paraphrases=1),
        train=TrainConfig(steps=3000, batch_size=32, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(every=1000),
        eval=EvalConfig(every=500, count=500, metric="eval/exact"),
    )
