"""A language model of captions: it writes them, goes on with them, and says them in other words.

    uv run train.py --config=configs/caption_lm.py

Two CPU cores, 18 minutes beside a dozen other programs: eval/loss 1.18, perplexity 3.3 a token. Of 300 `validation` captions
that it said in other words 84% kept their meaning: of one object all, of counts 84%, of relations 77% (it turns left and right
about). Train longer than this before you rewrite captions that a picture has to obey.

Nothing is downloaded: by default a small GPT-2 with fresh weights learns the captions of scenes. With your own weights
(a Hub id or a Hugging Face directory of GPT-2, Llama, Qwen, Gemma …), captions or text:

    --config.text.source=openai-community/gpt2 --config.optimizer.learning_rate=5e-5
    --config.text.source=HuggingFaceTB/SmolLM2-360M --config.text.adapt=lora --config.optimizer.learning_rate=2e-4
    --config.data.name=folder:DIR, or emoji, flickr8k, tfds:NAME, or a plain text: text:FILE (with --config.text.template=)

The result is runs/caption_lm/model, for sample.py --expand=runs/caption_lm/model and for --config.data.rewrite.source.
"""

from jaxgen.data.config import DataConfig
from jaxgen.train.config import EvalConfig, OptimizerConfig, TrainConfig
from jaxgen.train.language import LanguageConfig, LanguageRunConfig, WritingConfig


def get_config() -> LanguageRunConfig:
    return LanguageRunConfig(
        data=DataConfig(name="scenes", train_examples=20_000, paraphrases=1),
        text=LanguageConfig(template="in other words: {} ="),
        train=TrainConfig(steps=1000, batch_size=64, ema_decay=0.99, checkpoint_every=250),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        sample=WritingConfig(prompts=("", "in other words: a small red circle ="), every=250),
        eval=EvalConfig(every=250, count=512),
    )
