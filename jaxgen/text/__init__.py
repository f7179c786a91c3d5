"""Text encoders: Hugging Face language models in Flax, from caption to TextFeatures."""

from jaxgen.text.config import TextConfig
from jaxgen.text.encoder import TextEncoder, check_prompts, load_text_encoder, save_text_encoder
from jaxgen.text.features import TextFeatures

__all__ = ["TextConfig", "TextEncoder", "TextFeatures", "check_prompts", "load_text_encoder", "save_text_encoder"]
