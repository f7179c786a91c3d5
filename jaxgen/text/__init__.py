"""Text encoders: Hugging Face language models in Flax, from caption to TextFeatures."""

import importlib
from typing import TYPE_CHECKING, Any

from jaxgen.text.adapt import adapted
from jaxgen.text.config import TextConfig
from jaxgen.text.encoder import TextEncoder, check_prompts, load_text_encoder, save_text_encoder
from jaxgen.text.features import TextFeatures
from jaxgen.text.pair import PairedTextEncoder
from jaxgen.text.peft import load_adapter, save_adapter

if TYPE_CHECKING:
    from jaxgen.text.classifier import TextClassifier, load_text_classifier
    from jaxgen.text.expand import expand_prompts
    from jaxgen.text.generate import LanguageModel, load_language_model, save_language_model

__all__ = [
    "LanguageModel",
    "PairedTextEncoder",
    "TextClassifier",
    "TextConfig",
    "TextEncoder",
    "TextFeatures",
    "adapted",
    "check_prompts",
    "expand_prompts",
    "load_adapter",
    "load_language_model",
    "load_text_classifier",
    "load_text_encoder",
    "save_adapter",
    "save_language_model",
    "save_text_encoder",
]
LATER = {  # imported when asked for: drawing needs none of it
    **dict.fromkeys(("TextClassifier", "load_text_classifier"), "classifier"),
    **dict.fromkeys(("LanguageModel", "load_language_model", "save_language_model"), "generate"),
    "expand_prompts": "expand",
}


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxgen.text.{LATER[name]}"), name)
