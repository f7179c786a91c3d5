"""From config.json's model_type to the file that knows the architecture: a new one is one file and one line here."""

import importlib
import math
from dataclasses import fields
from typing import Any, get_type_hints

from jaxgen.errors import UserError
from jaxgen.text.architecture import DEEPEST, LARGEST, Architecture, Head

DECODERS = (
    *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"),
    *("qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl", "qwen3_vl_text"),
)
ARCHITECTURES: dict[str, tuple[str, str]] = {  # model_type -> (module of jaxgen.text, class)
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "distilbert"), ("bert", "BertConfig")),
    "gpt2": ("gpt2", "GPT2Config"),
    "clip_text_model": ("clip", "CLIPTextConfig"),
    **dict.fromkeys(("t5", "mt5", "umt5"), ("t5", "T5Config")),
    **dict.fromkeys(DECODERS, ("decoder", "DecoderConfig")),
}
# A model of which a text model is a part -> the model_type of that part.
PARTS = {"clip": "clip_text_model", "gemma3": "gemma3_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text"}


def text_config(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json's fields, those of the text part where the model has others beside it."""
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        return values
    kind = PARTS.get(str(values.get("model_type")), inner.get("model_type"))
    shared = {name: values[name] for name in ("projection_dim", "tie_word_embeddings") if name in values}
    part = {**shared, **inner, "model_type": kind}
    if kind == "clip_text_model":  # the whole model has the projection and says how wide it is
        part |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": values.get("projection_dim")}
    return part


def architecture(values: dict[str, Any], where: str, head: Head = "") -> Architecture:
    """The architecture of a config.json's fields; raises UserError with the list of known ones for an unknown one."""
    values = text_config(values)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        known = ", ".join(sorted({*ARCHITECTURES, *PARTS}))
        raise UserError(f"{where}: model_type {kind!r} is not known here; known: {known}")
    module, name = ARCHITECTURES[kind]
    try:
        made: Architecture = getattr(importlib.import_module(f"jaxgen.text.{module}"), name).from_hf(values, where, head)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: a field has a value that makes no sense for a {kind} ({error})") from None
    _check(made, where)
    return made


def _check(made: Any, where: str) -> None:
    """Raises UserError for a number that is none, or of a size that no model has: building it would take for ever."""
    hints = get_type_hints(type(made))
    for field in fields(made):
        hint, value = hints[field.name], getattr(made, field.name)
        # What may be 0 has that default; a token's id may be -1, for none.
        least = -1 if field.name.endswith("_token_id") else int(field.default != 0)
        right = {
            int: type(value) is int and least <= value <= LARGEST,
            float: type(value) in (int, float) and 0 <= value < math.inf,
            str: isinstance(value, str),
            bool: isinstance(value, bool),
        }
        if not right.get(hint, True):
            raise UserError(f"{where}: {field.name}={value!r} makes no sense")
    if made.depth > DEEPEST or made.max_length < 2:
        raise UserError(f"{where}: {made.depth} layers and {made.max_length} positions are no model's")
