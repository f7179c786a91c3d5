"""Sentences, or pairs of them, into classes: BERT, RoBERTa, XLM-RoBERTa and DistilBERT with the head they were tuned with."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.nn.module import Params, bind
from jaxgen.text.encoder import Pretrained, lengths, load_pretrained, pad, token_limit
from jaxgen.text.tokenizer import Tokenizer

Classify = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]


class TextClassifier:
    """Made by `load_text_classifier`. labels: a class's name each, as config.json's id2label has them."""

    def __init__(self, model: Pretrained, apply: Classify, tokenizer: Tokenizer, labels: tuple[str, ...], max_length: int):
        self.pretrained, self.params, self.apply = model, model.params, apply
        self.tokenizer, self.labels, self.max_length = tokenizer, labels, max_length
        self._jitted = jax.jit(apply)

    def tokenize(self, texts: Sequence[str | tuple[str, str]]) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask", "token_type_ids"}: int32 [B, T] each, T one of few lengths; types are 1 where a
        token is of the second of a pair. What is longer than max_length is cut, of a pair the longer one first."""
        rows, types = self.tokenizer.encode_pairs([texts] if isinstance(texts, str) else texts, self.max_length)
        longest = max(map(len, rows), default=1)
        length = next(n for n in lengths(self.max_length) if n >= longest)
        kinds = pad(types, length, 0)["input_ids"]
        return pad(rows, length, self.tokenizer.padding) | {"token_type_ids": kinds}

    def __call__(self, texts: Sequence[str | tuple[str, str]]) -> jax.Array:
        """Logits float32 [B, labels] of a list of sentences and of pairs (sentence, sentence)."""
        return self._jitted(self.params, *map(jnp.asarray, self.tokenize(texts).values()))

    def functional(self) -> tuple[Classify, Params]:
        """(apply, params): apply(params, input_ids, attention_mask, token_type_ids) -> logits is pure."""
        return self.apply, self.params


def load_text_classifier(
    source: str,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    max_length: int | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> TextClassifier:
    """A classifier of sentences from Hugging Face files; the arguments are load_text_encoder's.

    Raises UserError for files that are missing or broken, and for a model without a classification head."""
    model = load_pretrained(source, head="classification", dtype=dtype, mesh=mesh, subfolder=subfolder, tokenizer=tokenizer)
    architecture: Any = model.architecture
    words = Tokenizer(model.tokenizer_directory, source=tokenizer or source)
    words.fit(architecture.vocab_size)

    def apply(params: Params, input_ids: jax.Array, attention_mask: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        module = bind(architecture.build, params)
        _, last = module(input_ids, attention_mask, dtype, token_type_ids)
        return module.classify(last, input_ids, attention_mask).astype(jnp.float32)

    return TextClassifier(model, apply, words, _labels(model, architecture.num_labels), token_limit(model, max_length))


def _labels(model: Pretrained, count: int) -> tuple[str, ...]:
    named = model.values.get("id2label") or {str(i): f"LABEL_{i}" for i in range(count)}
    named = named if isinstance(named, dict) else {}
    if named.keys() != {str(i) for i in range(count)} or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{model.directory}/config.json: id2label does not name the labels 0 to {count - 1}")
    return tuple(named[str(i)] for i in range(count))
