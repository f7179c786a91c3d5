"""Emoji token by token: 32 x 32 pixels in the 8 x 8 tokens of a tokenizer trained on them.

    uv run train.py --config=configs/emoji_tokenizer.py --config.data.source=DIR --workdir=runs/emoji_tokenizer
    uv run train.py --config=configs/emoji_ar.py --config.data.source=DIR

DIR holds noto_emoji/ and fluent_emoji_3d/, each with pictures and a captions.jsonl. One core of two, the other busy:
5 minutes and 32. Of 32 training names drawn by lot 29 can be told at sight, the most of all families here
(benchmarks/RESULTS.md); it knows them by heart: on names never seen the loss is least at its first evaluation.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.autoregressive import Autoregressive
from jaxgen.families.codec import Pretrained
from jaxgen.families.transformer import TokenTransformer
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        # Dropout: the set has few pictures for a likelihood to be learned of.
        family=Autoregressive(
            codec=Pretrained("runs/emoji_tokenizer"), network=TokenTransformer(width=160, depth=6, head_dim=32, dropout=0.1)
        ),
        data=DataConfig(name="emoji", image_size=32, skin_tones=False),
        train=TrainConfig(steps=3_500, batch_size=32, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(
            prompts=(
                "a flat emoji of red apple",
                "a 3D emoji of red apple",
                "a flat emoji of dog face",
                "a 3D emoji of grinning face",
                "a flat emoji of rocket",
                "a 3D emoji of rocket",
                "a flat emoji of pizza",
                "a 3D emoji of sunflower",
            ),
            num_images=4,
            guidance_scale=2.0,
            top_p=0.95,
            every=500,
        ),
        eval=EvalConfig(every=500),
    )
