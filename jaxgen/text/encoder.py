"""A pretrained language model as a text encoder: captions in, TextFeatures out."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.nn.module import bind, flatten, init_params
from jaxgen.text import bert, sources, weights
from jaxgen.text.features import TextFeatures
from jaxgen.text.tokenizer import Tokenizer

ARCHITECTURES = {"bert": bert}
Layers = str | int | tuple[int, ...]
UNKNOWN_LIMIT = 0.2


class TextEncoder:
    """Made by `load_text_encoder`. `params` and `apply` are for use inside a compiled step, calling it for the rest."""

    def __init__(
        self,
        params: Any,
        apply: Callable[..., TextFeatures],
        tokenizer: Tokenizer,
        *,
        hidden_size: int,
        pooled_size: int,
        max_length: int,
        fingerprint: str,
    ):
        self.params, self.apply, self.tokenizer = params, apply, tokenizer
        self.hidden_size, self.pooled_size, self.max_length = hidden_size, pooled_size, max_length
        self.fingerprint = fingerprint
        # Few lengths, so that few programs are compiled.
        self.lengths = [n for n in (8, 16, 32, 64, 128, 256) if n < max_length] + [max_length]
        self._jitted = jax.jit(apply)

    def tokenize(self, captions: Sequence[str], length: int | None = None) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"}: int32 [B, T] each, T the smallest of `lengths` that holds them (or given).

        Longer captions are cut to max_length."""
        if isinstance(captions, str):
            captions = [captions]
        rows = self.tokenizer.encode(captions, self.max_length)
        longest = max(map(len, rows), default=1)
        length = length or next(n for n in self.lengths if n >= longest)
        ids = np.full((len(rows), length), self.tokenizer.padding, np.int32)
        mask = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return {"input_ids": ids, "attention_mask": mask}

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> TextFeatures:
        """Features of token ids int32 [B, T] with their mask, or of a caption or a list of captions."""
        if isinstance(input_ids, str) or (isinstance(input_ids, Sequence) and isinstance(input_ids[0], str)):
            tokens = self.tokenize([input_ids] if isinstance(input_ids, str) else input_ids)
            input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        if attention_mask is None:
            attention_mask = np.ones(np.shape(input_ids), np.int32)
        return self._jitted(self.params, jnp.asarray(input_ids), jnp.asarray(attention_mask))


def load_text_encoder(
    source: str,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    layers: Layers = "last",
    max_length: int | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> TextEncoder:
    """A text encoder from Hugging Face files (safetensors, config.json, tokenizer.json); no torch, no transformers model.

    source: a local directory, a Hub id, or an id of which an offline copy is installed. dtype: of the computation; the
    features are float32. mesh: where to replicate the weights. layers: "last", an index into the hidden states (0 is the
    embeddings, -1 the last layer), or a tuple of indices to join. max_length: tokens, at most what the model can take.
    tokenizer: a directory of its own. Raises UserError for files that are missing, broken, or of no known kind."""
    directory = sources.resolve(source, subfolder)
    config = _json(directory / "config.json")
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(f"{directory}/config.json: model_type {kind!r} is not known here; known: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[kind]
    c = architecture.BertConfig.from_hf(config, f"{directory}/config.json")

    def build(rngs: Any) -> Any:
        return architecture.Bert(c, rngs)

    abstract = dict(flatten(jax.eval_shape(lambda: init_params(build, jax.random.key(0)))))
    shapes = {name: leaf.shape for name, leaf in abstract.items()}
    table = architecture.tensors(c)
    params = weights.load(directory, table, shapes, architecture.IGNORED, architecture.PREFIXES)
    if mesh is None:
        params = jax.tree.map(jnp.asarray, params)
    else:
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        params = jax.tree.map(lambda p: jax.make_array_from_callback(p.shape, everywhere, lambda index: p[index]), params)

    chosen = _layer_indices(layers, c.num_hidden_layers)
    pool = _pooling(directory)

    def apply(params: Any, input_ids: jax.Array, attention_mask: jax.Array) -> TextFeatures:
        states = bind(build, params)(input_ids, attention_mask, dtype)
        hidden = jnp.concatenate([states[i] for i in chosen], axis=-1).astype(jnp.float32)
        return TextFeatures(hidden, pool(states[-1].astype(jnp.float32), attention_mask), attention_mask > 0)

    limit = min(_json(directory / "sentence_bert_config.json", {}).get("max_seq_length", 10**9), c.max_position_embeddings)
    if max_length is not None and not 2 <= max_length <= c.max_position_embeddings:
        raise UserError(f"text.max_length={max_length}: {source} takes from 2 to {c.max_position_embeddings} tokens")
    words = sources.resolve(tokenizer) if tokenizer else directory
    settings = {"layers": chosen, "max_length": max_length or limit, "dtype": jnp.dtype(dtype).name, "pooling": pool.__name__}
    return TextEncoder(
        params,
        apply,
        Tokenizer(words),
        hidden_size=c.hidden_size * len(chosen),
        pooled_size=c.hidden_size,
        max_length=max_length or limit,
        fingerprint=_fingerprint(directory, words, settings),
    )


def check_prompts(encoder: TextEncoder, prompts: Sequence[str], negative_prompt: str = "") -> list[str]:
    """Warnings, a line each, for prompts that will be cut; raises UserError for those that cannot be understood."""
    warnings = []
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("an empty prompt: say what to draw")
    for prompt in [*prompts, negative_prompt]:
        unknown = encoder.tokenizer.unknown_fraction(prompt)
        if unknown > UNKNOWN_LIMIT:
            raise UserError(
                f"the text encoder does not know {unknown:.0%} of {prompt!r}: write it in a language the encoder was "
                "trained on (this model's is English), or use a model trained with a multilingual text.source, such as "
                "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
            )
        tokens = encoder.tokenizer.count(prompt)
        if tokens > encoder.max_length:
            warnings.append(f"{prompt[:40]!r}… has {tokens} tokens; only the first {encoder.max_length} count")
    return warnings


def _layer_indices(layers: Layers, depth: int) -> tuple[int, ...]:
    wanted = (-1,) if layers == "last" else (layers,) if isinstance(layers, int) else layers
    if not isinstance(wanted, tuple) or not wanted or not all(isinstance(i, int) and -depth - 1 <= i <= depth for i in wanted):
        raise UserError(f'layers={layers!r}: "last", an index from {-depth - 1} to {depth}, or a tuple of them')
    return tuple(i % (depth + 1) for i in wanted)


def _pooling(directory: Path) -> Any:
    """The pooling that sentence-transformers' files in the directory define; without them, the first token (CLS)."""

    def first(hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return hidden[:, 0]

    def mean(hidden: jax.Array, mask: jax.Array) -> jax.Array:
        weights = mask[..., None].astype(hidden.dtype)
        return (hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1e-9)

    def normalised_first(hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return _normalise(first(hidden, mask))

    def normalised_mean(hidden: jax.Array, mask: jax.Array) -> jax.Array:
        return _normalise(mean(hidden, mask))

    config = _json(directory / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    modes = [name for name, on in config.items() if name.startswith("pooling_mode_") and on]
    normalise = any("Normalize" in module.get("type", "") for module in _json(directory / "modules.json", []))
    if modes == ["pooling_mode_mean_tokens"]:
        return normalised_mean if normalise else mean
    if modes == ["pooling_mode_cls_token"]:
        return normalised_first if normalise else first
    raise UserError(f"{directory}/1_Pooling/config.json: {', '.join(modes)} is not supported; mean or cls token is")


def _normalise(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _json(file: Path, default: Any = None) -> Any:
    if not file.is_file() and default is not None:
        return default
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {file.parent} is no whole Hugging Face model directory") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{file} is no valid JSON ({error}); download it again") from None


def _fingerprint(directory: Path, words: Path, settings: dict[str, Any]) -> str:
    """SHA-256 over the weights' and the tokenizer's files and whatever else changes the features."""
    names = [file for file in (words / "tokenizer.json", words / "vocab.txt") if file.is_file()][:1]
    parts = [sources.sha256(file) for file in [*weights.files(directory), *names]]
    return hashlib.sha256(json.dumps([parts, settings]).encode()).hexdigest()
