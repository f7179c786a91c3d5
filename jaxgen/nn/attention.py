"""Multi-head attention with QK-norm, optional rotary positions, and keys of its own, of a context (text), or of both."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.nn.layers import RMSNorm, matmul, zeros
from jaxgen.nn.module import param
from jaxgen.parallel.mesh import constrain, platform

# A compiled CPU program runs attention best as plain batched products on head-major arrays; an accelerator has kernels
# for it behind jax.nn.dot_product_attention.

_plain: ContextVar[bool] = ContextVar("plain_attention", default=False)
Cache = tuple[jax.Array, jax.Array]  # keys and values [B, H, S, d] of S slots


class Attention(nnx.Module):
    """Attention over x [B, T, D]; separate q, k, v kernels [D, H, d] keep a tensor-parallel mesh free of reshuffles."""

    def __init__(self, dim: int, head_dim: int, rngs: nnx.Rngs, *, context_dim: int | None = None, own_keys: bool = True):
        heads = dim // head_dim
        if heads * head_dim != dim:
            raise ValueError(f"width {dim} is not a multiple of the head size {head_dim}")
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))

        def project(width: int) -> nnx.Param:
            return param(init, rngs, (width, heads, head_dim), ("embed", "heads", "kv"))

        self.own_keys = own_keys
        self.q, self.q_norm = project(dim), RMSNorm(head_dim, rngs)
        self.out = param(zeros, rngs, (heads, head_dim, dim), ("heads", "kv", "embed"))
        if own_keys:
            self.k, self.v, self.k_norm = project(dim), project(dim), RMSNorm(head_dim, rngs)
        if context_dim is not None:
            self.context_k, self.context_v = project(context_dim), project(context_dim)
            self.context_norm = RMSNorm(head_dim, rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        context: jax.Array | None = None,
        mask: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """x [B, T, D] -> [B, T, D]. The keys are x's own, then those of context [B, S, C] (of it alone without `own_keys`).

        mask: bool of the keys that count, [B, keys] or [B, 1, T, keys]. rotary (cos, sin), each [T, d/2], turns x's queries
        and keys."""
        q, keys, values = self._queries(x, rotary), [], []
        if self.own_keys:
            k, v = self._own(x, rotary)
            keys.append(k)
            values.append(v)
        if context is not None:
            keys.append(self.context_norm(_project(context, self.context_k)))
            values.append(_project(context, self.context_v))
        return self._merge(attend(q, jnp.concatenate(keys, axis=2), jnp.concatenate(values, axis=2), mask), x)

    def cached(
        self,
        x: jax.Array,
        cache: Cache,
        start: jax.Array | int,
        *,
        mask: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The same for x [B, T, D] that stands at slots `start`, `start` + 1, … of a cache, whose keys are then all there
        are: (y [B, T, D], the cache with x's own keys and values in it). mask: bool [B, S] of the slots that count."""
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=2)  # noqa: E731
        k, v = self._own(x, rotary)
        cache = put(cache[0], k), put(cache[1], v)
        return self._merge(attend(self._queries(x, rotary), *cache, mask), x), cache

    def empty_cache(self, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
        zeros = jnp.zeros((batch, self.k.shape[1], slots, self.k.shape[2]), dtype)
        return zeros, zeros

    def _queries(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array] | None) -> jax.Array:
        q = self.q_norm(_project(x, self.q))
        return q if rotary is None else rotate(q, *rotary)

    def _own(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, jax.Array]:
        k = self.k_norm(_project(x, self.k))
        return k if rotary is None else rotate(k, *rotary), _project(x, self.v)

    def _merge(self, y: jax.Array, x: jax.Array) -> jax.Array:
        return constrain(matmul(merge_heads(y), self.out[...].astype(x.dtype).reshape(-1, x.shape[-1])), "embed")


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """[B, T, H d] -> [B, H, T, d]."""
    b, t, _ = x.shape
    return x.reshape(b, t, heads, -1).transpose(0, 2, 1, 3)


def merge_heads(x: jax.Array) -> jax.Array:
    """[B, H, T, d] -> [B, T, H d], the inverse of `split_heads`."""
    b, h, t, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, t, h * d)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    bias: jax.Array | None = None,
    softcap: float = 0.0,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k scale + bias) v for head-major arrays: q [B, H, T, d]; k, v [B, K, S, d], each of the K heads shared by
    H / K queries (arXiv 2305.13245). mask: bool [B, S] of the keys that count, or [B or 1, 1, T, S]. scale: 1 / sqrt(d) by
    default. bias: [1, H, T, S]. softcap c: logits become c tanh(logits / c) (arXiv 2408.00118). prefix: keys and values
    [K, P, d] that stand before everybody's (arXiv 2101.00190), never masked."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    if prefix is not None:
        count = prefix[0].shape[1]
        k, v = (
            jnp.concatenate([jnp.broadcast_to(p.astype(a.dtype), (len(a), *p.shape)), a], axis=2)
            for p, a in zip(prefix, (k, v), strict=True)
        )
        before = ((0, 0), (0, 0), (0, 0), (count, 0))
        mask = None if mask is None else jnp.pad(mask, before, constant_values=True)
        bias = None if bias is None else jnp.pad(bias, before)
    if platform() != "cpu" and not softcap and not _plain.get():
        swap = lambda a: a.transpose(0, 2, 1, 3)  # noqa: E731
        if bias is not None:
            bias = bias.astype(q.dtype)
        return swap(jax.nn.dot_product_attention(swap(q), swap(k), swap(v), bias, mask, scale=scale))
    b, heads, t, d = q.shape
    grouped = (b, k.shape[1], heads // k.shape[1] * t)
    logits = ((q * scale).reshape(*grouped, d) @ k.swapaxes(-1, -2)).reshape(b, heads, t, -1)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(v.dtype)
    return (weights.reshape(*grouped, -1) @ v).reshape(b, heads, t, v.shape[-1])


@contextmanager
def plain_attention() -> Generator[None]:
    """Within it attention is traced as plain products: not every kernel has a forward-mode derivative (jax.jvp)."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def rotary_1d(length: int, head_dim: int, theta: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [length, head_dim/2], for positions along a sequence (arXiv 2104.09864)."""
    angles = jnp.arange(length)[:, None] * theta ** (-jnp.arange(head_dim // 2) / (head_dim // 2))
    return jnp.cos(angles), jnp.sin(angles)


def rotary_2d(height: int, width: int, head_dim: int, theta: float = 100.0, *, still: int = 0) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [still + height*width, head_dim/2]: half of the pairs turn with the row, half with the column
    (rotary positions, arXiv 2104.09864, on two axes as in arXiv 2403.13298). `still` positions before the grid do not turn:
    text tokens, whose order is in their features already."""
    pairs = head_dim // 4
    frequencies = theta ** (-jnp.arange(pairs) / pairs)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    angles = jnp.concatenate([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], axis=-1)
    angles = jnp.pad(angles, ((still, 0), (0, 0)))
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[i], x[i + d/2]) of [B, H, T, d] by the angles of [T, d/2] tables (or [B, 1, T, d/2])."""
    # Not split into halves: what joins them again is slow on a CPU, above all backwards.
    turned = jnp.roll(x, x.shape[-1] // 2, axis=-1)
    twice = lambda first, second: jnp.concatenate([first, second], axis=-1).astype(x.dtype)  # noqa: E731
    return x * twice(cos, cos) + turned * twice(-sin, sin)


def _project(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    """[B, T, D] by [D, H, d] -> [B, H, T, d]."""
    d, h, k = kernel.shape
    return split_heads(matmul(x, kernel[...].astype(x.dtype).reshape(d, h * k)), h)
