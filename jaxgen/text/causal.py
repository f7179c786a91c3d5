"""What causal transformers share: where tokens stand, which ones each sees, the cache of keys and values, and the way through
a language model."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.nn.layers import Embedding, matmul
from jaxgen.text.architecture import last_token

Pair = tuple[jax.Array, jax.Array]  # a layer's keys and values [B, K, S, d] of S slots
Cache = Sequence[Pair]


def places(ids: jax.Array, mask: jax.Array, cache: Cache | None, start: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(slots [T], positions [B or 1, T], lengths [B] of the rows so far) of ids [B, T] from slot `start` on.

    Without a cache rows begin at the first slot; with one, padding stands in front and counts for nothing."""
    slots = start + jnp.arange(ids.shape[1])
    counts = jax.lax.dynamic_slice_in_dim(jnp.cumsum(mask > 0, axis=1), start, ids.shape[1], axis=1)
    return slots, slots[None] if cache is None else jnp.maximum(counts - 1, 0), counts[:, -1]


def visible(mask: jax.Array, slots: jax.Array, window: int = 0) -> jax.Array:
    """bool [B, 1, T, S]: which of the S keys, real by mask [B, S], each query sees: itself and those before it, `window` of
    them together where that is not 0."""
    back = slots[:, None] - jnp.arange(mask.shape[1])
    seen = (back >= 0) & (back < window) if window else back >= 0
    return seen & (mask > 0)[:, None, None, :]


def remember(cache: Pair | None, k: jax.Array, v: jax.Array, start: Any) -> Pair:
    """A layer's keys and values [B, K, S, d], with the new ones [B, K, T, d] at `start`; without a cache those alone."""
    if cache is None:
        return k, v
    old_k, old_v = cache
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=2)  # noqa: E731
    return put(old_k, k), put(old_v, v)


class LanguageModel(nnx.Module):
    """Its subclasses have `words`, `layers` and `norm`, and `lm_head`, None where the table of words is the head."""

    words: Embedding
    layers: nnx.List
    norm: Any
    lm_head: Any

    def through(self, x: jax.Array, cache: Cache | None, call: Callable[..., tuple[jax.Array, Pair]]) -> Any:
        """x [B, T, D] through the layers, call(i, layer, x, cache of it) -> (x, keys and values): (states, last), or with a
        cache (states, last, cache)."""
        states, kept = [x], []
        for i, layer in enumerate(self.layers):
            x, pair = call(i, layer, x, None if cache is None else cache[i])
            states.append(x)
            kept.append(pair)
        states[-1] = self.norm(x)
        return (states, states[-1]) if cache is None else (states, states[-1], tuple(kept))

    def pool(self, last: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return last_token(last, mask)

    def logits(self, last: jax.Array) -> jax.Array:
        """[..., D] -> [..., V]."""
        return self.lm_head(last) if self.lm_head else matmul(last, self.words.embedding[...].astype(last.dtype).T)


def empty_cache(layers: int, batch: int, heads: int, slots: int, size: int, dtype: Any) -> Cache:
    zeros = jnp.zeros((batch, heads, slots, size), dtype)
    return ((zeros, zeros),) * layers
