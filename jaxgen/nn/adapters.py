"""Small trainable additions to a frozen transformer's layers, which are nothing at size 0; adapt.py chooses among them."""

import jax
from flax import nnx

from jaxgen.nn.layers import Linear
from jaxgen.nn.module import param


class Bottleneck(nnx.Module):
    """x + up(gelu(down(x))), which starts as x (Houlsby et al., arXiv 1902.00751)."""

    def __init__(self, dim: int, size: int, rngs: nnx.Rngs):
        self.size = size
        if size:
            self.down = Linear(dim, size, rngs, axes=("embed", None))
            self.up = Linear(size, dim, rngs, axes=(None, "embed"), zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.up(jax.nn.gelu(self.down(x), approximate=True)) if self.size else x


class Prefix(nnx.Module):
    """Trained keys and values [heads, count, head_dim] that every query of a layer sees (Li and Liang, arXiv 2101.00190)."""

    def __init__(self, count: int, heads: int, head_dim: int, rngs: nnx.Rngs):
        self.count = count
        if count:
            self.k = param(nnx.initializers.normal(1.0), rngs, (heads, count, head_dim), ("heads", None, "kv"))
            self.v = param(nnx.initializers.normal(0.02), rngs, (heads, count, head_dim), ("heads", None, "kv"))

    def __call__(self) -> tuple[jax.Array, jax.Array] | None:
        return (self.k[...], self.v[...]) if self.count else None
