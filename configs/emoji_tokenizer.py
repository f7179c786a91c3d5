"""A tokenizer of emoji: 32 x 32 pixels into 8 x 8 tokens of 1000.

    uv run train.py --config=configs/emoji_tokenizer.py --config.data.source=DIR

DIR holds noto_emoji/ and fluent_emoji_3d/, each with pictures and a captions.jsonl. One core of two, the other busy:
5 minutes. Pictures never seen come back in their colours and outlines; a face's features, or lines one pixel thin, blurred.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.autoencoder import Autoencoder, Convolutional
from jaxgen.families.fsq import FSQ
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Autoencoder(network=Convolutional(widths=(48, 96), bottleneck=FSQ((8, 5, 5, 5)))),
        data=DataConfig(name="emoji", image_size=32, skin_tones=False),
        train=TrainConfig(steps=2500, batch_size=32, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(every=500),
        eval=EvalConfig(every=500),
    )
