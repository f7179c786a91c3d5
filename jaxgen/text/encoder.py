"""A pretrained language model as a text encoder: captions in, TextFeatures out."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.nn.layers import standardise
from jaxgen.nn.module import Params, bind, flatten, init_params, logical_axes
from jaxgen.parallel.mesh import param_shardings
from jaxgen.text import registry, sources, weights
from jaxgen.text.adapt import fitted
from jaxgen.text.architecture import Architecture, Head, last_token, mean_tokens
from jaxgen.text.features import TextFeatures
from jaxgen.text.sources import read_json
from jaxgen.text.tokenizer import Tokenizer

Layers = str | int | tuple[int, ...]
Apply = Callable[[Params, jax.Array, jax.Array], TextFeatures]
UNKNOWN_LIMIT = 0.2


@dataclass(frozen=True)
class Pretrained:
    """A language model read from Hugging Face files: `values` of its config.json (the text part), `architecture` and
    weights; `digest` is of the files read."""

    directory: Path
    tokenizer_directory: Path
    values: dict[str, Any]
    architecture: Architecture
    params: Params
    digest: str


class TextEncoder:
    """Made by `load_text_encoder`. `params` and `apply` are for use inside a compiled step, calling it for the rest."""

    def __init__(
        self,
        params: Params,
        apply: Apply,
        tokenizer: Tokenizer,
        *,
        hidden_size: int,
        pooled_size: int,
        max_length: int,
        fingerprint: str,
        pretrained: Pretrained | None = None,
    ):
        self.params, self.apply, self.tokenizer = params, apply, tokenizer
        self.hidden_size, self.pooled_size, self.max_length = hidden_size, pooled_size, max_length
        self.fingerprint, self.pretrained = fingerprint, pretrained
        # Few lengths, so that few programs are compiled; besides a template's tokens, which all captions share.
        self.lengths = [n + tokenizer.cut for n in lengths(max_length)]
        self._jitted = jax.jit(apply)

    @property
    def parts(self) -> "tuple[TextEncoder, ...]":
        """The encoders that it consists of."""
        return (self,)

    def tokenize(self, captions: Sequence[str], length: int | None = None) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"}: int32 [B, T] each, T the smallest of `lengths` that holds them (or given).

        Longer captions are cut to max_length (and to a given length)."""
        if isinstance(captions, str):
            captions = [captions]
        rows = self.tokenizer.encode(captions, min(self.max_length, (length or self.lengths[-1]) - self.tokenizer.cut))
        return pad(rows, length or self.bucket(max(map(len, rows), default=1)), self.tokenizer.padding)

    def count(self, captions: Sequence[str]) -> np.ndarray:
        """int32 [N]: how many tokens each caption takes, a template's included, at most max_length besides those."""
        return np.array([len(row) for row in self.tokenizer.encode(captions, self.max_length)], np.int32)

    def bucket(self, count: int) -> int:
        """The smallest of `lengths` that holds `count` tokens."""
        return next(n for n in self.lengths if n >= count)

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> TextFeatures:
        """Features of token ids int32 [B, T] with their mask, or of a caption or a list of captions."""
        if isinstance(input_ids, str) or (isinstance(input_ids, Sequence) and isinstance(input_ids[0], str)):
            tokens = self.tokenize([input_ids] if isinstance(input_ids, str) else input_ids)
            input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        if attention_mask is None:
            attention_mask = np.ones(np.shape(input_ids), np.int32)
        return self._jitted(self.params, jnp.asarray(input_ids), jnp.asarray(attention_mask))

    def functional(self) -> tuple[Apply, Params]:
        """(apply, params): apply(params, input_ids, attention_mask) -> TextFeatures is pure, for jit, grad, vmap, shard_map."""
        return self.apply, self.params


def load_text_encoder(
    source: str,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    layers: Layers = "last",
    max_length: int | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
    template: str | None = None,
) -> TextEncoder:
    """A text encoder from Hugging Face files (safetensors, config.json, tokenizer.json); no torch, no transformers model.

    source: a local directory, one safetensors file in it, or a Hub id. dtype: of the weights and the computation; the
    features are float32. mesh: over which the weights lie; each process reads the slices it owns. layers: "last", an index
    into the hidden states (0 is the embeddings), a tuple of indices to join, or "average" of all, layer-normalised
    (arXiv 2506.08210). max_length: tokens, at most what the model can take. subfolder: of the source (diffusers:
    "text_encoder_2", whose tokenizer is beside it). tokenizer: a directory of its own. template: an instruction around each
    caption, "... {} ..."; the features of what stands before the caption are cut off again. Raises UserError for files that
    are missing, broken, or of no known kind."""
    model = load_pretrained(source, dtype=dtype, mesh=mesh, subfolder=subfolder, tokenizer=tokenizer)
    architecture, limit = model.architecture, token_limit(model, max_length)
    words = Tokenizer(model.tokenizer_directory, template, tokenizer or source)
    words.fit(architecture.vocab_size)
    join, hidden_size = _joined(layers, architecture)
    pool = _pooling(model.directory)

    def apply(params: Params, input_ids: jax.Array, attention_mask: jax.Array) -> TextFeatures:
        module = bind(fitted(architecture, params).build, params)
        states, last = module(input_ids, attention_mask, dtype)
        last = last.astype(jnp.float32)
        pooled = pool(last, attention_mask) if pool else module.pool(last, input_ids, attention_mask)
        hidden, mask = join(states, last), attention_mask > 0
        return TextFeatures(hidden[:, words.cut :], pooled.astype(jnp.float32), mask[:, words.cut :])

    settings = {"layers": layers, "max_length": limit, "dtype": jnp.dtype(dtype).name, "template": template}
    return TextEncoder(
        model.params,
        apply,
        words,
        hidden_size=hidden_size,
        pooled_size=architecture.pooled_size,
        max_length=limit,
        fingerprint=hashlib.sha256(json.dumps([model.digest, settings]).encode()).hexdigest(),
        pretrained=model,
    )


def load_pretrained(
    source: str,
    *,
    head: Head = "",
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> Pretrained:
    """Configuration and weights of a language model, with one of its heads; the arguments are load_text_encoder's."""
    directory = sources.resolve(source, subfolder)
    stored = directory
    if directory.is_file():
        directory = directory.parent
    values = registry.text_config(read_json(directory / "config.json"))
    architecture = registry.architecture(values, f"{directory}/config.json", head)
    abstract = jax.eval_shape(lambda: init_params(architecture.build, jax.random.key(0)))
    shapes = {name: leaf.shape for name, leaf in flatten(abstract)}
    placed = None
    if mesh is not None:
        placed = dict(flatten(param_shardings(mesh, logical_axes(architecture.build), abstract)))
    params = weights.load(
        stored,
        architecture.tensors(),
        shapes,
        ignored=architecture.ignored,
        prefixes=architecture.prefixes,
        dtype=dtype,
        shardings=placed,
    )
    words = sources.resolve(tokenizer) if tokenizer else sources.tokenizer_directory(directory)
    files = [*weights.files(stored), *sources.tokenizer_files(words)[:1]]
    digest = hashlib.sha256("".join(map(sources.sha256, files)).encode()).hexdigest()
    return Pretrained(directory, words, values, architecture, params, digest)


def save_text_encoder(encoder: TextEncoder, directory: str | Path) -> None:
    """Write a Hugging Face directory with the encoder's weights (as they are), configuration, tokenizer and a digest.

    transformers loads it to the same outputs; load_text_encoder refuses it once a byte of the weights has changed."""
    if encoder.pretrained is None:
        raise UserError("this text encoder was not read from a Hugging Face directory: save the ones it is made of")
    save_pretrained(encoder.pretrained, encoder.params, directory)


def save_pretrained(model: Pretrained, params: Params, directory: str | Path) -> None:
    target = Path(directory)
    sources.check_new(target)
    table = model.architecture.tensors()
    if more := sorted({name for name, _ in flatten(params)} - table.keys()):
        raise UserError(f"{more[0]} has no place in a Hugging Face directory: save the adapter (jaxgen.text.peft.save_adapter)")
    target.mkdir(parents=True, exist_ok=True)
    kept = dict.fromkeys([*sources.tokenizer_files(model.tokenizer_directory), *sources.extra_files(model.directory)])
    for file in kept:
        root = model.directory if file.is_relative_to(model.directory) else model.tokenizer_directory
        (target / file.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / file.relative_to(root))
    name = "model.safetensors"
    if getattr(model.architecture, "head", "") == "lm":  # transformers has the model itself one level below its head
        level = model.architecture.prefixes[-1]
        table = {o: t if t.name.startswith("lm_head") else replace(t, name=level + t.name) for o, t in table.items()}
    weights.save(target / name, params, table)
    (target / weights.DIGEST).write_text(json.dumps({name: sources.sha256(target / name)}))
    (target / "config.json").write_text(json.dumps(model.values, indent=2))  # last: without it the directory is no model


def check_prompts(encoder: TextEncoder, prompts: Sequence[str], negative_prompt: str = "") -> list[str]:
    """Warnings, a line each, for prompts that will be cut; raises UserError for those that cannot be understood."""
    warnings = []
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("an empty prompt: say what to draw")
    for prompt in [*prompts, negative_prompt]:
        # Of encoders side by side it is enough if one understands.
        words = min((part.tokenizer for part in encoder.parts), key=lambda words: words.unknown_fraction(prompt))
        unknown = words.unknown_fraction(prompt)
        if unknown > UNKNOWN_LIMIT:
            raise UserError(
                f"the text encoder does not know {unknown:.0%} of {prompt!r}: the tokenizer of {words.source} lacks these "
                "words. Write it in a language that it knows, or use a model trained with a multilingual text.source, such as "
                "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
            )
        longest = max(encoder.parts, key=lambda part: part.max_length)
        tokens = longest.tokenizer.count(prompt)
        if tokens > longest.max_length:
            warnings.append(f"{prompt[:40]!r}… has {tokens} tokens; only the first {longest.max_length} count")
    return warnings


def pad(rows: Sequence[Sequence[int]], length: int, padding: int, *, front: bool = False) -> dict[str, np.ndarray]:
    """Token ids in a rectangle, padded at the end (or in front), with their mask."""
    ids = np.full((len(rows), length), padding, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if front else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def lengths(limit: int) -> list[int]:
    """The few lengths up to `limit` that rows of tokens are padded to."""
    return [*(2**i for i in range(3, 31) if 2**i < limit), limit]


def token_limit(model: Pretrained, asked: int | None = None) -> int:
    """How many tokens a caption may have: as many as asked for, or the least of what the model, the tokenizer and the
    sentence encoder say. Raises UserError where the model does not take so many."""
    most = model.architecture.max_length
    if asked is not None:
        if not isinstance(asked, int) or not 2 <= asked <= most:
            raise UserError(f"text.max_length={asked}: {model.directory} takes from 2 to {most} tokens")
        return asked
    said = [read_json(model.directory / "sentence_bert_config.json", {}).get("max_seq_length")]
    said.append(read_json(model.tokenizer_directory / "tokenizer_config.json", {}).get("model_max_length"))
    # Tokenizers without a limit say 10^30.
    return min([most, *(int(n) for n in said if isinstance(n, int | float) and 2 <= n < 10**9)])


def _joined(layers: Layers, architecture: Architecture) -> tuple[Callable[[list[jax.Array], jax.Array], jax.Array], int]:
    """(states, last) -> float32 hidden [B, T, D], and D."""
    depth, width = architecture.depth, architecture.hidden_size
    if layers == "last":
        return lambda states, last: last, width
    if layers == "average":

        def average(states: list[jax.Array], last: jax.Array) -> jax.Array:
            return standardise(jnp.stack([*states[:-1], last]), 1e-5).mean(0)

        return average, width
    wanted = (layers,) if isinstance(layers, int) else layers
    if not isinstance(wanted, tuple) or not wanted or not all(isinstance(i, int) and -depth - 1 <= i <= depth for i in wanted):
        raise UserError(
            f'layers={layers!r}: "last", "average", an index from {-depth - 1} to {depth}, or a tuple of such indices'
        )
    return lambda states, last: jnp.concatenate([states[i] for i in wanted], axis=-1).astype(jnp.float32), width * len(wanted)


def _pooling(directory: Path) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """(last, mask) -> pooled as sentence-transformers' files in the directory define it; None without such files."""
    modes = {
        "pooling_mode_mean_tokens": mean_tokens,
        "pooling_mode_cls_token": lambda last, mask: last[:, 0],
        "pooling_mode_lasttoken": last_token,
    }
    file = directory / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    chosen = [name for name, on in read_json(file).items() if name.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise UserError(f"{file}: {', '.join(chosen) or 'no mode'} is not supported; one of {', '.join(modes)} is")
    pool = modes[chosen[0]]
    modules = read_json(directory / "modules.json", [])
    if not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{directory / 'modules.json'} is no list of modules; download it again")
    if any("Normalize" in str(module.get("type")) for module in modules):
        return lambda last, mask: _normalise(pool(last, mask))
    return pool


def _normalise(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
