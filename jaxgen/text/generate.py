"""Text from a causal language model: one compiled program from prompt to last token."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.nn.module import Params, bind
from jaxgen.text import sources, weights
from jaxgen.text.adapt import fitted
from jaxgen.text.encoder import Pretrained, load_pretrained, pad, save_pretrained
from jaxgen.text.sources import read_json
from jaxgen.text.tokenizer import Tokenizer

ENDS = 8  # end tokens up to which their number makes no other program


class LanguageModel:
    """Made by `load_language_model`. ends: ids of the tokens that end a text. templates: what its config.json says that a
    prompt is put into, {} in its place, by task (`task_specific_params`): "expand", "rewrite"."""

    def __init__(self, model: Pretrained, dtype: Any = jnp.float32):
        self.pretrained, self.params, self.dtype = model, model.params, jnp.dtype(dtype)
        said = read_json(model.directory / "generation_config.json", {}).get("eos_token_id", model.values.get("eos_token_id"))
        self.ends: tuple[int, ...] = tuple(said) if isinstance(said, list) else () if said is None else (said,)
        if not all(isinstance(end, int) for end in self.ends):
            raise UserError(f"{model.directory}: eos_token_id={said!r} is no token's id and no list of such")
        tasks = model.values.get("task_specific_params") or {}
        found = {task: said.get("template") for task, said in tasks.items() if isinstance(said, dict)}
        self.templates: dict[str, str] = {task: said for task, said in found.items() if isinstance(said, str)}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.pretrained.tokenizer_directory)

    @functools.cached_property
    def line_ends(self) -> tuple[int, ...]:
        """`ends`, and the token that ends a line where the vocabulary has one."""
        last = self.tokenizer.encode(["a\n"], 2**30)[0][-1]
        return (*self.ends, last) if self.tokenizer.decode([last]) == "\n" else self.ends

    def generate(
        self,
        prompts: Any,
        mask: Any = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        ends: Sequence[int] | None = None,
    ) -> list[Any]:
        """What follows each prompt, a list of texts; of token ids (a list of lists, or int [B, T] with their mask) lists of
        ids, without the token that ended them.

        temperature: 0 takes the likeliest token. top_k: among so many likeliest (0: all); top_p: among the fewest likeliest
        that have this probability together (arXiv 1904.09751). seed: with a prompt's place in the list it decides what is
        drawn, whatever the other prompts are; a list gives each prompt its own, whatever its place. ends: instead of the
        model's own; () goes on to max_new_tokens. A new number of prompts or of new tokens, or a prompt of twice the length,
        compiles again. Raises UserError for settings without sense, ids beyond the vocabulary, and more tokens than the model
        has positions."""
        if max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} and top_k={top_k} at least 0, "
                f"top_p={top_p} in (0, 1]"
            )
        rows, written = self._rows(prompts, mask)
        if not rows:
            return []
        architecture: Any = fitted(self.pretrained.architecture, self.params)
        longest = max(map(len, rows))
        if longest + max_new_tokens > architecture.max_length:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} are more than the "
                f"{architecture.max_length} positions of this model"
            )
        width = 8
        while width < longest:
            width *= 2
        padded = pad(rows, width, 0, front=True)
        stop = sorted(self.ends if ends is None else ends)
        tokens = _generate(
            architecture,
            self.params,
            padded["input_ids"],
            padded["attention_mask"],
            _keys(seed, len(rows)),
            np.array(stop + [-1] * (ENDS - len(stop)), np.int32),
            np.float32(temperature),
            np.int32(top_k),
            np.float32(top_p),
            max_new_tokens=max_new_tokens,
            dtype=self.dtype,
        )
        found = [[token for token in row if token >= 0 and token not in stop] for row in np.asarray(tokens).tolist()]
        return [self.tokenizer.decode(row) for row in found] if written else found

    def _rows(self, prompts: Any, mask: Any) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether they were texts."""
        if isinstance(prompts, str) or (isinstance(prompts, Sequence) and any(isinstance(prompt, str) for prompt in prompts)):
            return self.tokenizer.encode([prompts] if isinstance(prompts, str) else prompts, 2**30), True
        masks = [np.ones(len(row)) for row in prompts] if mask is None else mask
        rows = [np.asarray(row)[np.asarray(real) > 0].tolist() for row, real in zip(prompts, masks, strict=True)]
        architecture: Any = self.pretrained.architecture
        size = architecture.vocab_size
        for row in rows:
            if not row or not all(isinstance(i, int) and 0 <= i < size for i in row):
                raise UserError(f"a prompt needs token ids from 0 to {size - 1}, at least one")
        return rows, False


def load_language_model(
    source: str,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    subfolder: str | None = None,
    tokenizer: str | None = None,
) -> LanguageModel:
    """A causal language model with its head from Hugging Face files; the arguments are load_text_encoder's.

    Raises UserError for files that are missing, broken, or of no model that writes."""
    model = load_pretrained(source, head="lm", dtype=dtype, mesh=mesh, subfolder=subfolder, tokenizer=tokenizer)
    return LanguageModel(model, dtype)


def save_language_model(model: LanguageModel, directory: str | Path) -> None:
    """Write a Hugging Face directory with the model's weights (as they are), configuration, tokenizer and a digest.

    transformers loads it as the causal language model that it is; load_language_model refuses it once a byte of the weights
    has changed. Raises UserError where something is there already, or for weights that have no place in such a directory."""
    save_pretrained(model.pretrained, model.params, directory)


def fingerprint(source: str) -> str:
    """A digest of all the files that decide what a language model writes, without reading its weights into memory."""
    stored = sources.resolve(source)
    directory = stored.parent if stored.is_file() else stored
    files = [*weights.files(stored), *sources.tokenizer_files(sources.tokenizer_directory(directory))[:1]]
    files += [file for name in ("config.json", "generation_config.json") if (file := directory / name).is_file()]
    return hashlib.sha256("".join(map(sources.sha256, files)).encode()).hexdigest()


def _keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """A key for each of `count` prompts."""
    if isinstance(seed, int):
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(count))
    if len(seed) != count:
        raise UserError(f"{len(seed)} seeds for {count} prompts: give one each, or one for all")
    return jax.vmap(jax.random.key)(np.asarray(seed, np.uint32))


def generate(
    architecture: Any,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    keys: jax.Array,
    ends: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    *,
    max_new_tokens: int,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """int32 [B, max_new_tokens] that follow ids int [B, T], padded in front by mask [B, T], each row drawn with its key of
    keys [B]; -1 after a token of ends int [E].

    Pure; only `architecture`, `max_new_tokens`, `dtype` and shapes make another program. It ends as soon as all rows have."""
    module = bind(architecture.build, params)
    batch, width = ids.shape
    cache = module.empty_cache(batch, width + max_new_tokens, dtype)
    mask = jnp.pad(mask, ((0, 0), (0, max_new_tokens)), constant_values=1)

    def step(ids: jax.Array, at: Any, start: Any, cache: Any) -> tuple[jax.Array, Any]:
        """The token that comes `at`-th, after ids at slots from `start` on."""
        _, last, cache = module(ids, mask, dtype, cache, start)
        logits = module.logits(last[:, -1]).astype(jnp.float32)
        return choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, at), temperature, top_k, top_p), cache

    def more(state: Any) -> jax.Array:
        at, _, ended, _ = state
        return (at < max_new_tokens) & ~ended.all()

    def go_on(state: Any) -> Any:
        at, tokens, ended, cache = state
        before = jax.lax.dynamic_slice_in_dim(tokens, at - 1, 1, axis=1)
        token, cache = step(jnp.maximum(before, 0), at, width + at - 1, cache)
        token = jnp.where(ended, -1, token)
        return at + 1, tokens.at[:, at].set(token), ended | jnp.isin(token, ends), cache

    first, cache = step(ids, 0, 0, cache)
    tokens = jnp.full((batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(more, go_on, (jnp.int32(1), tokens, jnp.isin(first, ends), cache))[1]


def choose(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """int32 [B] from logits float32 [B, V], each row with its key: the largest, or with a temperature drawn.

    Tokens as likely as the least likely one that top_k and top_p leave stay with it."""

    def kept(scaled: jax.Array) -> jax.Array:
        ranked, rank = jnp.sort(scaled, axis=-1, descending=True), jnp.arange(scaled.shape[-1])
        within = (rank < top_k) | (top_k == 0)
        share = jax.nn.softmax(jnp.where(within, ranked, -jnp.inf), axis=-1)
        likelier = jnp.cumsum(share, axis=-1) - share  # what those before have together
        within &= (likelier < top_p) | (top_p >= 1)
        return jnp.where(scaled < jnp.where(within, ranked, jnp.inf).min(axis=-1, keepdims=True), -jnp.inf, scaled)

    def draw(logits: jax.Array) -> jax.Array:
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature  # the largest is 0, however cold it is
        scaled = jax.lax.cond((top_k > 0) | (top_p < 1), kept, lambda scaled: scaled, scaled)  # a sort takes its time
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32), logits)


_generate = jax.jit(generate, static_argnames=("architecture", "max_new_tokens", "dtype"))
