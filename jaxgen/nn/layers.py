"""Layers that every network shares. Arrays are channels-last; computation follows the dtype of the input."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.nn.module import param
from jaxgen.parallel.mesh import constrain, platform

zeros = nnx.initializers.zeros_init()
ones = nnx.initializers.ones_init()


class Linear(nnx.Module):
    """x [..., in] @ kernel [in, out] + bias [out]."""

    def __init__(self, din: int, dout: int, rngs: nnx.Rngs, *, axes=("embed", "mlp"), bias: bool = True, zero: bool = False):
        init = zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = param(init, rngs, (din, dout), axes)
        self.bias = param(zeros, rngs, (dout,), (axes[1],)) if bias else None
        self.out_axis = axes[1]

    def __call__(self, x: jax.Array) -> jax.Array:
        y = constrain(matmul(x, self.kernel[...].astype(x.dtype)), self.out_axis)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Conv(nnx.Module):
    """A `size` x `size` convolution with SAME padding over x [B, H, W, in], kernel [size, size, in, out]."""

    def __init__(self, din: int, dout: int, rngs: nnx.Rngs, *, size: int = 3, zero: bool = False):
        init = zeros if zero else nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = param(init, rngs, (size, size, din, dout), (None, None, "in_channels", "channels"))
        self.bias = param(zeros, rngs, (dout,), ("channels",))

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return constrain(y, "channels") + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) over the last axis, times a learned scale (Zhang and Sennrich, arXiv 1910.07467), or 1 + scale (`shifted`)."""

    def __init__(
        self, dim: int, rngs: nnx.Rngs, *, axes=(None,), learned: bool = True, shifted: bool = False, eps: float = 1e-6
    ):
        self.scale = param(zeros if shifted else ones, rngs, (dim,), axes) if learned else None
        self.shifted, self.eps = shifted, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            # 1 + scale in float32: half precision would round the sum.
            y = y * (1.0 + self.scale[...].astype(jnp.float32) if self.shifted else self.scale[...])
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation over the last axis, times a learned scale, plus a bias (arXiv 1607.06450)."""

    def __init__(self, dim: int, rngs: nnx.Rngs, *, eps: float):
        self.scale = param(ones, rngs, (dim,), (None,))
        self.bias = param(zeros, rngs, (dim,), (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return (standardise(x, self.eps) * self.scale[...] + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
    """ids int [...] -> rows [..., dim] of a table [count, dim]."""

    def __init__(self, count: int, dim: int, rngs: nnx.Rngs, *, axes: tuple[str | None, str | None] = (None, "embed")):
        self.embedding = param(nnx.initializers.normal(0.02), rngs, (count, dim), axes)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]


class MLP(nnx.Module):
    """Linear, gelu, linear; `dropout` falls on the hidden layer when a key is given."""

    def __init__(self, dim: int, hidden: int, rngs: nnx.Rngs, *, zero: bool = False, dropout: float = 0.0):
        self.up = Linear(dim, hidden, rngs, axes=("embed", "mlp"))
        self.down = Linear(hidden, dim, rngs, axes=("mlp", "embed"), zero=zero)
        self.dropout = dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.down(dropout(jax.nn.gelu(self.up(x), approximate=True), self.dropout, key))


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out]; on a CPU as a product of two matrices, as the gradient of one with more axes is compiled
    to transposed copies there."""
    if platform() != "cpu":
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def standardise(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / deviation over the last axis, float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a share `rate` of x and scale the rest up; without a key (sampling) x itself."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def modulate(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """x [B, ..., D] scaled and shifted per example by [B, D] vectors (adaptive normalisation, arXiv 2212.09748)."""
    expand = (slice(None), *[None] * (x.ndim - 2))
    return x * (1 + scale[expand]) + shift[expand]


def time_frequencies(count: int) -> jax.Array:
    """float32 [count], geometric from 1 to 1000 half turns a unit of time."""
    return jnp.exp(jnp.linspace(0.0, math.log(1000.0), count))


def time_features(t: jax.Array, dim: int) -> jax.Array:
    """Sines and cosines of t [B] in [0, 1] at `dim` / 2 geometric frequencies -> float32 [B, dim]."""
    angles = t.astype(jnp.float32)[:, None] * time_frequencies(dim // 2) * math.pi
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, H, W, C] -> [B, H/patch, W/patch, patch*patch*C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
    """The inverse of `patchify`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // patch**2)
