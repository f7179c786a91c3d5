"""Text encoders: Hugging Face language models in Flax, from caption to TextFeatures."""

from jaxgen.text.adapt import adapted
from jaxgen.text.config import TextConfig
from jaxgen.text.encoder import TextEncoder, check_prompts, load_text_encoder, save_text_encoder
from jaxgen.text.features import TextFeatures
from jaxgen.text.peft import load_adapter, save_adapter

__all__ = [
    "TextConfig",
    "TextEncoder",
    "TextFeatures",
    "adapted",
    "check_prompts",
    "load_adapter",
    "load_text_encoder",
    "save_adapter",
    "save_text_encoder",
]
