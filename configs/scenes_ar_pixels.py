"""Scenes of 16 x 16 pixels, drawn pixel by pixel: 256 tokens out of a palette of 729 colours.

    uv run train.py --config=configs/scenes_ar_pixels.py

One of two CPU cores, the other busy: 23 minutes. Drawn exactly, of 1,000 captions and three seeds each: `test` 78.5%; single
objects 97.6%, two in a relation 70.9%, two to four alike 72.6%. Of pictures this small, 98% of the set's own are judged exact,
95% in the palette's colours.
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.autoregressive import Autoregressive
from jaxgen.families.palette import Palette
from jaxgen.families.transformer import TokenTransformer
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        # Nine levels: the grey of the background is one of them.
        family=Autoregressive(codec=Palette(9), network=TokenTransformer(width=96, depth=6, head_dim=32)),
        data=DataConfig(name="scenes", image_size=16, train_examples=60_000, paraphrases=1),
        train=TrainConfig(steps=1_450, batch_size=32, ema_decay=0.999, checkpoint_every=500),
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
            temperature=0.8,
            every=725,
        ),
        eval=EvalConfig(every=725, count=256, metric="eval/exact"),
    )
