"""The encoder of T5 (Raffel et al., arXiv 1910.10683), T5 v1.1 (gated MLPs, arXiv 2002.05202), mT5 (arXiv 2010.11934) and
UMT5 (arXiv 2304.09151): pre-norm, relative positions, no biases. Larger ones overflow float16; bfloat16 holds them."""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.errors import UserError
from jaxgen.nn.adapters import Bottleneck, Prefix
from jaxgen.nn.attention import attend, merge_heads, split_heads
from jaxgen.nn.layers import Embedding, Linear, RMSNorm
from jaxgen.text.architecture import ACTIVATIONS, Head, mean_tokens, refuse, take
from jaxgen.text.weights import Table, Tensor, layer, norm


@dataclass(frozen=True)
class T5Config:
    """bias_per_layer: each layer has relative positions of its own (UMT5), else all share the first one's.

    n_positions: relative positions know no limit, this is the length of the training texts."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    n_positions: int = 512
    bias_per_layer: bool = False
    bottleneck: int = 0
    prefix: int = 0
    prefixes: ClassVar[tuple[str, ...]] = ("transformer.",)

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str, head: Head = "") -> "T5Config":
        kind = values["model_type"]
        if head:
            raise UserError(f"{where}: of a {kind} the encoder is read; it has no {head} head")
        refuse(values, where, is_decoder=False)
        refuse(values, where, feed_forward_proj=(*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)))
        names = [f.name for f in fields(cls)[:11]]
        given: dict[str, Any] = {"feed_forward_proj": "relu" if kind == "t5" else "gated-gelu"}
        given |= take(values, where, {name: name for name in names}, tuple(names[:6]))
        config = cls(**given, bias_per_layer=kind == "umt5")
        count, furthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        if not 1 <= count // 4 < furthest:
            raise UserError(
                f"{where}: relative_attention_num_buckets={count} do not divide distances up to "
                f"relative_attention_max_distance={furthest}"
            )
        return config

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def pooled_size(self) -> int:
        return self.d_model

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def max_length(self) -> int:
        return self.n_positions

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj.startswith("gated-")

    @property
    def ignored(self) -> tuple[str, ...]:
        """The decoder and the heads."""
        return (r"decoder\.", r"lm_head\.", r"classification_head\.", r"classifier\.", r"qa_outputs\.")

    def build(self, rngs: nnx.Rngs) -> "T5Encoder":
        return T5Encoder(self, rngs)

    def tensors(self) -> Table:
        table = {
            "words.embedding": Tensor("shared.weight", alias="encoder.embed_tokens.weight"),
            **norm("norm", "encoder.final_layer_norm", bias=False),
        }
        mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if self.gated else {"up": "wi", "down": "wo"}
        names = {"q": "q", "k": "k", "v": "v", "out": "o"}
        names = {ours: f"0.SelfAttention.{theirs}" for ours, theirs in names.items()}
        names |= {"norm1": "0.layer_norm", "norm2": "1.layer_norm"}
        names |= {ours: f"1.DenseReluDense.{theirs}" for ours, theirs in mlp.items()}
        for i in range(self.num_layers):
            where = f"encoder.block.{i}.layer"
            table |= layer(f"layers.{i}", where, names, bias=False)
            if i == 0 or self.bias_per_layer:
                table[f"biases.{i}.embedding"] = Tensor(f"{where}.0.SelfAttention.relative_attention_bias.weight")
        return table


class T5Encoder(nnx.Module):
    def __init__(self, c: T5Config, rngs: nnx.Rngs):
        self.config = c
        self.words = Embedding(c.vocab_size, c.d_model, rngs, axes=("vocab", "embed"))
        count = c.num_layers if c.bias_per_layer else 1
        shape = (c.relative_attention_num_buckets, c.num_heads)
        self.biases = nnx.List([Embedding(*shape, rngs, axes=(None, "heads")) for _ in range(count)])
        self.layers = nnx.List([Layer(c, rngs) for _ in range(c.num_layers)])
        self.norm = RMSNorm(c.d_model, rngs, eps=c.layer_norm_epsilon)

    def __call__(self, ids: jax.Array, mask: jax.Array, dtype: Any = jnp.float32) -> tuple[list[jax.Array], jax.Array]:
        c, t = self.config, ids.shape[1]
        # The buckets of the 2T - 1 distances, and which of them each query (row) and key (column) have.
        distances = np.arange(1 - t, t)
        steps = jnp.asarray(buckets(distances, c.relative_attention_num_buckets, c.relative_attention_max_distance))
        at = jnp.arange(t) - jnp.arange(t)[:, None] + t - 1
        biases = [bias(steps)[at].transpose(2, 0, 1)[None] for bias in self.biases]
        states = [self.words(ids).astype(dtype)]
        for i, each in enumerate(self.layers):
            states.append(each(states[-1], mask > 0, biases[i % len(biases)]))
        states[-1] = self.norm(states[-1])
        return states, states[-1]

    def pool(self, last: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """The mean over the real tokens; T5 itself defines no pooled vector."""
        return mean_tokens(last, mask)


class Layer(nnx.Module):
    def __init__(self, c: T5Config, rngs: nnx.Rngs):
        d, inner = c.d_model, c.num_heads * c.d_kv
        self.heads, self.activation = c.num_heads, ACTIVATIONS["gelu_new"]
        if c.feed_forward_proj != "gated-gelu":  # which means the approximate gelu, "gelu" the exact one
            self.activation = ACTIVATIONS[c.feed_forward_proj.removeprefix("gated-")]
        self.norm1, self.norm2 = RMSNorm(d, rngs, eps=c.layer_norm_epsilon), RMSNorm(d, rngs, eps=c.layer_norm_epsilon)
        self.q, self.k, self.v = (Linear(d, inner, rngs, axes=("embed", "heads"), bias=False) for _ in range(3))
        self.out = Linear(inner, d, rngs, axes=("heads", "embed"), bias=False)
        self.gate = Linear(d, c.d_ff, rngs, axes=("embed", "mlp"), bias=False) if c.gated else None
        self.up = Linear(d, c.d_ff, rngs, axes=("embed", "mlp"), bias=False)
        self.down = Linear(c.d_ff, d, rngs, axes=("mlp", "embed"), bias=False)
        self.adapter1, self.adapter2 = Bottleneck(d, c.bottleneck, rngs), Bottleneck(d, c.bottleneck, rngs)
        self.prefix = Prefix(c.prefix, c.num_heads, c.d_kv, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array) -> jax.Array:
        """x [B, T, D], mask bool [B, T], bias float32 [1, H, T, T] -> [B, T, D]."""
        h = self.norm1(x)
        # Logits that nothing scales down are large: in float32.
        q, k, v = (split_heads(projected(h), self.heads).astype(jnp.float32) for projected in (self.q, self.k, self.v))
        y = merge_heads(attend(q, k, v, mask, scale=1.0, bias=bias, prefix=self.prefix()))
        x = x + self.adapter1(self.out(y.astype(x.dtype)))
        h = self.norm2(x)
        y = self.down(self.activation(self.gate(h)) * self.up(h) if self.gate else self.activation(self.up(h)))
        return x + self.adapter2(y)


def buckets(distances: np.ndarray, count: int, furthest: int) -> np.ndarray:
    """The bucket, 0 to count - 1, of each distance from query to key (int, any shape): half of them for keys behind it;
    of each half, half for one distance each and half for logarithmically growing ranges of them up to `furthest`."""
    half = count // 2
    exact = half // 2
    away = np.abs(distances)
    # In float32 and on the host: models were trained with its rounding, and accelerators' logarithms differ.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(furthest / exact))
    ranged = exact + (ratio * np.float32(half - exact)).astype(np.int32)
    return (distances > 0) * half + np.where(away < exact, away, np.minimum(ranged, half - 1))
