"""The layer that BERT, GPT-2 and CLIP have alike, but for where its norms stand: attention and an MLP, with biases."""

from typing import Any

import jax
from flax import nnx

from jaxgen.nn.adapters import Bottleneck, Prefix
from jaxgen.nn.attention import attend, merge_heads, split_heads
from jaxgen.nn.layers import LayerNorm, Linear
from jaxgen.text.architecture import ACTIVATIONS
from jaxgen.text.causal import Pair, remember


class Layer(nnx.Module):
    """scale: of attention's logits, 1 / sqrt(head size) by default. bottleneck, prefix: see architecture.Architecture."""

    def __init__(
        self,
        dim: int,
        heads: int,
        inner: int,
        activation: str,
        rngs: nnx.Rngs,
        *,
        eps: float,
        bottleneck: int,
        prefix: int,
        scale: float | None = None,
    ):
        self.heads, self.activation, self.scale = heads, ACTIVATIONS[activation], scale
        self.q, self.k, self.v = (Linear(dim, dim, rngs, axes=("embed", "heads")) for _ in range(3))
        self.out = Linear(dim, dim, rngs, axes=("heads", "embed"))
        self.norm1, self.norm2 = LayerNorm(dim, rngs, eps=eps), LayerNorm(dim, rngs, eps=eps)
        self.up = Linear(dim, inner, rngs, axes=("embed", "mlp"))
        self.down = Linear(inner, dim, rngs, axes=("mlp", "embed"))
        self.adapter1, self.adapter2 = Bottleneck(dim, bottleneck, rngs), Bottleneck(dim, bottleneck, rngs)
        self.prefix = Prefix(prefix, heads, dim // heads, rngs)

    def attention(self, x: jax.Array, mask: jax.Array, cache: Pair | None = None, start: Any = 0) -> tuple[jax.Array, Pair]:
        """x [B, T, D] -> [B, T, D], and the keys and values that it came from; mask as attend's, cache as remember's."""
        q, k, v = (split_heads(projected(x), self.heads) for projected in (self.q, self.k, self.v))
        k, v = pair = remember(cache, k, v, start)
        y = merge_heads(attend(q, k, v, mask, scale=self.scale, prefix=self.prefix()))
        return self.adapter1(self.out(y)), pair

    def mlp(self, x: jax.Array) -> jax.Array:
        return self.adapter2(self.down(self.activation(self.up(x))))


class PreNorm(Layer):
    def __call__(self, x: jax.Array, mask: jax.Array, cache: Pair | None = None, start: Any = 0) -> tuple[jax.Array, Pair]:
        y, pair = self.attention(self.norm1(x), mask, cache, start)
        x = x + y
        return x + self.mlp(self.norm2(x)), pair


class PostNorm(Layer):
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = self.norm1(x + self.attention(x, mask)[0])
        return self.norm2(x + self.mlp(x))
