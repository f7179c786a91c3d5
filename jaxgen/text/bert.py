"""BERT (Devlin et al., arXiv 1810.04805): post-norm transformer with learned positions, as Hugging Face stores it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.errors import UserError
from jaxgen.nn.attention import attend
from jaxgen.nn.layers import Linear, ones, zeros
from jaxgen.nn.module import param

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"

    @staticmethod
    def from_hf(values: dict[str, Any], where: str) -> "BertConfig":
        """From the fields of a config.json; raises UserError for what this architecture does not do."""
        names = BertConfig.__dataclass_fields__
        missing = [n for n in names if n not in values and n not in ("type_vocab_size", "layer_norm_eps", "hidden_act")]
        if missing:
            raise UserError(f"{where} lacks {', '.join(missing)}")
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise UserError(f"{where}: position_embedding_type={values['position_embedding_type']!r} is not supported")
        config = BertConfig(**{name: values[name] for name in names if name in values})
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(f"{where}: hidden_act={config.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
        if config.hidden_size % config.num_attention_heads:
            raise UserError(f"{where}: hidden_size is no multiple of num_attention_heads")
        return config


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, eps: float, rngs: nnx.Rngs):
        self.scale = param(ones, rngs, (dim,), (None,))
        self.bias = param(zeros, rngs, (dim,), (None,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class Embedding(nnx.Module):
    def __init__(self, count: int, dim: int, rngs: nnx.Rngs, axes: tuple[str | None, str | None] = (None, "embed")):
        self.embedding = param(nnx.initializers.normal(0.02), rngs, (count, dim), axes)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]


class Bert(nnx.Module):
    """ids, mask int [B, T] -> the hidden states after the embeddings and after each layer, [B, T, D] each."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.words = Embedding(c.vocab_size, c.hidden_size, rngs, ("vocab", "embed"))
        self.positions = Embedding(c.max_position_embeddings, c.hidden_size, rngs)
        self.types = Embedding(c.type_vocab_size, c.hidden_size, rngs)
        self.norm = LayerNorm(c.hidden_size, c.layer_norm_eps, rngs)
        self.layers = nnx.List([Layer(c, rngs) for _ in range(c.num_hidden_layers)])

    def __call__(self, ids: jax.Array, mask: jax.Array, dtype: Any = jnp.float32) -> list[jax.Array]:
        x = self.words(ids) + self.positions(jnp.arange(ids.shape[1])) + self.types(jnp.zeros((), jnp.int32))
        states = [self.norm(x).astype(dtype)]
        for layer in self.layers:
            states.append(layer(states[-1], mask > 0))
        return states


class Layer(nnx.Module):
    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        d = c.hidden_size
        self.heads, self.activation = c.num_attention_heads, ACTIVATIONS[c.hidden_act]
        self.q, self.k, self.v = (Linear(d, d, rngs, axes=("embed", "heads")) for _ in range(3))
        self.out = Linear(d, d, rngs, axes=("heads", "embed"))
        self.norm1, self.norm2 = LayerNorm(d, c.layer_norm_eps, rngs), LayerNorm(d, c.layer_norm_eps, rngs)
        self.up = Linear(d, c.intermediate_size, rngs, axes=("embed", "mlp"))
        self.down = Linear(c.intermediate_size, d, rngs, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        b, t, d = x.shape

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(b, t, self.heads, d // self.heads).transpose(0, 2, 1, 3)

        attended = attend(split(self.q(x)), split(self.k(x)), split(self.v(x)), mask)
        x = self.norm1(x + self.out(attended.transpose(0, 2, 1, 3).reshape(b, t, d)))
        return self.norm2(x + self.down(self.activation(self.up(x))))


def tensors(c: BertConfig) -> dict[str, tuple[str, bool]]:
    """Hugging Face's name -> (ours, whether the matrix is stored transposed)."""
    table = {
        "embeddings.word_embeddings.weight": ("words.embedding", False),
        "embeddings.position_embeddings.weight": ("positions.embedding", False),
        "embeddings.token_type_embeddings.weight": ("types.embedding", False),
        "embeddings.LayerNorm.weight": ("norm.scale", False),
        "embeddings.LayerNorm.bias": ("norm.bias", False),
    }
    linear = {
        "attention.self.query": "q",
        "attention.self.key": "k",
        "attention.self.value": "v",
        "attention.output.dense": "out",
        "intermediate.dense": "up",
        "output.dense": "down",
    }
    norms = {"attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2"}
    for i in range(c.num_hidden_layers):
        for theirs, ours in linear.items():
            table[f"encoder.layer.{i}.{theirs}.weight"] = (f"layers.{i}.{ours}.kernel", True)
            table[f"encoder.layer.{i}.{theirs}.bias"] = (f"layers.{i}.{ours}.bias", False)
        for theirs, ours in norms.items():
            table[f"encoder.layer.{i}.{theirs}.weight"] = (f"layers.{i}.{ours}.scale", False)
            table[f"encoder.layer.{i}.{theirs}.bias"] = (f"layers.{i}.{ours}.bias", False)
    return table


# In some files and used by nothing here: buffers, the pooler (trained for next-sentence prediction), pretraining heads.
IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids", "pooler.", "cls.")
PREFIXES = ("bert.",)
