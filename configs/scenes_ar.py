"""Scenes, token by token: a transformer writes the 8 x 8 tokens of a trained tokenizer, row by row.

    uv run train.py --config=configs/scenes_tokenizer.py --workdir=runs/scenes_tokenizer
    uv run train.py --config=configs/scenes_ar.py

Two CPU cores beside other work, 23 minutes for the tokenizer and 40 for this. Drawn exactly, of 1,000 captions and three seeds
each: `test` 91.4%, pairs of colour and shape never seen together 61.9%, held-out words in a held-out sentence 69.5%
(python benchmarks/accuracy.py --model=ar).
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.autoregressive import Autoregressive
from jaxgen.families.codec import Pretrained
from jaxgen.families.transformer import TokenTransformer
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Autoregressive(
            codec=Pretrained("runs/scenes_tokenizer"), network=TokenTransformer(width=96, depth=6, head_dim=32)
        ),
        # Twice the flow's pictures: each is seen but twice or thrice, as a likelihood is learned by heart sooner.
        data=DataConfig(name="scenes", train_examples=120_000, paraphrases=1),
        train=TrainConfig(steps=4500, batch_size=64, ema_decay=0.999, checkpoint_every=500),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, schedule="trapezoid", warmup_steps=100),
        sample=SampleConfig(
            prompts=(
                "a large red circle above a small blue square",
                "a small green triangle to the left of a large yellow ring",
                "three small orange diamonds",
                "a large purple cross",
            ),
            num_images=4,
            guidance_scale=1.5,
            temperature=0.9,
            every=1500,
        ),
        eval=EvalConfig(every=1500, count=256, metric="eval/exact"),
    )
