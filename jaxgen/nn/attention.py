"""Multi-head attention with QK-norm, optional rotary positions and an extra set of keys (text) joined to the own ones."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.nn.layers import RMSNorm, zeros
from jaxgen.nn.module import param

# A compiled CPU program runs attention best as plain batched products on head-major arrays; an accelerator has kernels
# for it behind jax.nn.dot_product_attention.


class Attention(nnx.Module):
    """Attention over x [B, T, D]; separate q, k, v kernels [D, H, d] keep a tensor-parallel mesh free of reshuffles."""

    def __init__(self, dim: int, head_dim: int, rngs: nnx.Rngs, *, context_dim: int | None = None):
        heads = dim // head_dim
        if heads * head_dim != dim:
            raise ValueError(f"width {dim} is not a multiple of the head size {head_dim}")
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2))

        def project(width: int) -> nnx.Param:
            return param(init, rngs, (width, heads, head_dim), ("embed", "heads", "kv"))

        self.q, self.k, self.v = project(dim), project(dim), project(dim)
        self.out = param(zeros, rngs, (heads, head_dim, dim), ("heads", "kv", "embed"))
        self.q_norm, self.k_norm = RMSNorm(head_dim, rngs), RMSNorm(head_dim, rngs)
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
        """x [B, T, D], context [B, S, C] whose keys follow x's own, mask bool [B, T + S] of the keys that count,
        rotary (cos, sin) each [T, d/2] for x's own queries and keys -> [B, T, D]."""
        q, k = self.q_norm(_project(x, self.q)), self.k_norm(_project(x, self.k))
        v = _project(x, self.v)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if context is not None:
            k = jnp.concatenate([k, self.context_norm(_project(context, self.context_k))], axis=2)
            v = jnp.concatenate([v, _project(context, self.context_v)], axis=2)
        y = attend(q, k, v, mask)
        b, h, t, d = y.shape
        return y.transpose(0, 2, 1, 3).reshape(b, t, h * d) @ self.out[...].astype(x.dtype).reshape(h * d, -1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """softmax(q k / sqrt(d)) v for head-major [B, H, T, d] arrays; mask bool [B, S] of the keys that count."""
    if jax.default_backend() != "cpu":
        swap = lambda a: a.transpose(0, 2, 1, 3)  # noqa: E731
        joint = None if mask is None else mask[:, None, None, :]
        return swap(jax.nn.dot_product_attention(swap(q), swap(k), swap(v), mask=joint))
    logits = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.swapaxes(-1, -2)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -1e30)
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1).astype(v.dtype) @ v


def rotary_2d(height: int, width: int, head_dim: int, theta: float = 100.0) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32 [height*width, head_dim/2]: half of the pairs turn with the row, half with the column
    (rotary positions, arXiv 2104.09864, on two axes as in arXiv 2403.13298)."""
    pairs = head_dim // 4
    frequencies = theta ** (-jnp.arange(pairs) / pairs)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    angles = jnp.concatenate([rows.reshape(-1, 1) * frequencies, columns.reshape(-1, 1) * frequencies], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x[i], x[i + d/2]) of [B, H, T, d] by the angles of [T, d/2] tables."""
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _project(x: jax.Array, kernel: nnx.Param) -> jax.Array:
    """[B, T, D] by [D, H, d] -> [B, H, T, d]."""
    d, h, k = kernel.shape
    b, t, _ = x.shape
    return (x @ kernel[...].astype(x.dtype).reshape(d, h * k)).reshape(b, t, h, k).transpose(0, 2, 1, 3)
