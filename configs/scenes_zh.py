"""Scenes with English and Chinese captions, read by a small text encoder that learns from nothing together with the generator.

    uv run python -m jaxgen.text.scratch ./runs/text_zh --captions=scenes --languages=en,zh
    uv run train.py --config=configs/scenes_zh.py --workdir=runs/scenes_zh

One CPU core with another busy one beside it, 52 minutes. Drawn exactly, of 1,000 captions each: `test` (English) 26.5%,
`test_zh` (Chinese) 26.2%; single objects 69.3% and 73.3%, two in a relation 7.1% and 4.7%. The encoder knows the words of these
captions and no others. At the generator's own rate (adapt_learning_rate_scale=1.0, AdamW at 2e-3) it fell into one state for
all words, and the shapes were clean but not those asked for (0.1%).

To score it: python benchmarks/accuracy.py --workdir=runs/scenes_zh --splits=test,test_zh --seeds=0
"""

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.text.adapt import Full
from jaxgen.text.config import TextConfig
from jaxgen.train.config import OptimizerConfig, RunConfig, SampleConfig, TrainConfig


def get_config() -> RunConfig:
    return RunConfig(
        family=Flow(network=UNet(widths=(64, 128), down=(1, 2), up=(2, 2)), time_mean=0.4, sample_shift=3.0),
        data=DataConfig(name="scenes", train_examples=20_000, paraphrases=1, languages=("en", "zh")),
        text=TextConfig(source="./runs/text_zh", adapt=Full(), adapt_learning_rate_scale=0.1),
        train=TrainConfig(steps=4000, batch_size=16, ema_decay=0.998, checkpoint_every=500, log_every=100),
        optimizer=OptimizerConfig(name="muon", learning_rate=2e-3, warmup_steps=50),
        sample=SampleConfig(
            prompts=(
                "a large red circle above a small blue square",
                "一个大的红色圆形在一个小的蓝色正方形的上面",
                "三个小的橙色菱形",
                "一个大的紫色十字形",
            ),
            num_images=4,
            num_steps=25,
            guidance_scale=1.5,
            sampler="euler",
            every=2000,
        ),
    )
