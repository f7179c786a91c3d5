"""BERT (Devlin et al., arXiv 1810.04805) and its kin: RoBERTa (arXiv 1907.11692), XLM-RoBERTa (arXiv 1911.02116) and
DistilBERT (arXiv 1910.01108): post-norm transformers with learned positions that read in both directions."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.nn.adapters import Bottleneck, Prefix
from jaxgen.nn.attention import attend
from jaxgen.nn.layers import Embedding, LayerNorm, Linear
from jaxgen.text.architecture import ACTIVATIONS, Head, check_heads, refuse, take
from jaxgen.text.weights import Table, Tensor, linear, norm

DISTILBERT = {  # its names -> BERT's
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "activation": "hidden_act",
}


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    kind: Literal["bert", "roberta", "distilbert"] = "bert"
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int = 0
    num_labels: int = 2
    head: Head = ""
    bottleneck: int = 0
    prefix: int = 0
    prefixes: ClassVar[tuple[str, ...]] = ("bert.", "roberta.", "distilbert.")

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str, head: Head = "") -> "BertConfig":
        kind = {"xlm-roberta": "roberta"}.get(values["model_type"], values["model_type"])
        refuse(values, where, position_embedding_type="absolute", sinusoidal_pos_embds=False, hidden_act=tuple(ACTIVATIONS))
        refuse(values, where, activation=tuple(ACTIVATIONS), is_decoder=False)
        names = {name: name for name in ("vocab_size", "max_position_embeddings", "pad_token_id")}
        if kind == "distilbert":
            names |= DISTILBERT
        else:
            names |= {name: name for name in (*DISTILBERT.values(), "type_vocab_size", "layer_norm_eps")}
        required = [f.name for f in fields(cls)[:6]]
        theirs = {ours: name for name, ours in names.items()}
        chosen = take(values, where, names, tuple(theirs[name] for name in required))
        if head == "classification":
            chosen["num_labels"] = len(values.get("id2label") or {}) or values.get("num_labels") or 2
        given: dict[str, Any] = {"kind": kind, "head": head, "pad_token_id": int(kind == "roberta")} | chosen
        config = cls(**given)
        check_heads(config.hidden_size, config.num_attention_heads, where)
        return config

    @property
    def depth(self) -> int:
        return self.num_hidden_layers

    @property
    def pooled_size(self) -> int:
        return self.hidden_size

    @property
    def max_length(self) -> int:
        """RoBERTa's positions begin after the padding token's id."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.kind == "roberta" else 0)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Buffers, pretraining heads, and the pooler and classifier where no head is asked for."""
        always = (r"embeddings\.position_ids", r"embeddings\.token_type_ids", r"cls\.", r"lm_head\.", r"vocab_")
        if self.head:
            return (*always, r"pooler\.") if self.kind != "bert" else always
        return (*always, r"pooler\.", r"classifier\.", r"pre_classifier\.")

    def build(self, rngs: nnx.Rngs) -> "Bert":
        return Bert(self, rngs)

    def tensors(self) -> Table:
        table = {
            "words.embedding": Tensor("embeddings.word_embeddings.weight"),
            "positions.embedding": Tensor("embeddings.position_embeddings.weight"),
            **norm("norm", "embeddings.LayerNorm"),
        }
        if self.kind != "distilbert":
            table["types.embedding"] = Tensor("embeddings.token_type_embeddings.weight")
        names = {
            "q": "attention.self.query",
            "k": "attention.self.key",
            "v": "attention.self.value",
            "out": "attention.output.dense",
            "norm1": "attention.output.LayerNorm",
            "up": "intermediate.dense",
            "down": "output.dense",
            "norm2": "output.LayerNorm",
        }
        layer = "encoder.layer"
        if self.kind == "distilbert":
            layer = "transformer.layer"
            names = {ours: f"attention.{ours}_lin" for ours in ("q", "k", "v", "out")}
            names |= {"norm1": "sa_layer_norm", "up": "ffn.lin1", "down": "ffn.lin2", "norm2": "output_layer_norm"}
        for i in range(self.num_hidden_layers):
            for ours, theirs in names.items():
                kind = norm if ours.startswith("norm") else linear
                table |= kind(f"layers.{i}.{ours}", f"{layer}.{i}.{theirs}")
        if self.head == "classification":
            dense = {"bert": "pooler.dense", "roberta": "classifier.dense", "distilbert": "pre_classifier"}[self.kind]
            labels = {"roberta": "classifier.out_proj"}.get(self.kind, "classifier")
            table |= linear("dense", dense) | linear("labels", labels)
        return table


class Bert(nnx.Module):
    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        d = c.hidden_size
        self.config = c
        self.words = Embedding(c.vocab_size, d, rngs, axes=("vocab", "embed"))
        self.positions = Embedding(c.max_position_embeddings, d, rngs)
        if c.kind != "distilbert":
            self.types = Embedding(c.type_vocab_size, d, rngs)
        self.norm = LayerNorm(d, rngs, eps=c.layer_norm_eps)
        self.layers = nnx.List([Layer(c, rngs) for _ in range(c.num_hidden_layers)])
        if c.head == "classification":
            self.dense = Linear(d, d, rngs, axes=("embed", None))
            self.labels = Linear(d, c.num_labels, rngs, axes=("embed", None))

    def __call__(self, ids: jax.Array, mask: jax.Array, dtype: Any = jnp.float32) -> tuple[list[jax.Array], jax.Array]:
        states = [self.embed(ids, mask, dtype)]
        for layer in self.layers:
            states.append(layer(states[-1], mask > 0))
        return states, states[-1]

    def embed(self, ids: jax.Array, mask: jax.Array, dtype: Any) -> jax.Array:
        """Every token of one sentence is of type 0."""
        positions = jnp.arange(ids.shape[1])
        if self.config.kind == "roberta":
            real = mask.astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + self.config.pad_token_id
        x = self.words(ids) + self.positions(positions)
        if self.config.kind != "distilbert":
            x = x + self.types(jnp.zeros((), jnp.int32))
        return self.norm(x).astype(dtype)

    def pool(self, last: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return last[:, 0]  # CLS

    def classify(self, last: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        squash = jax.nn.relu if self.config.kind == "distilbert" else jnp.tanh
        return self.labels(squash(self.dense(last[:, 0])))


class Layer(nnx.Module):
    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        d = c.hidden_size
        self.heads, self.activation = c.num_attention_heads, ACTIVATIONS[c.hidden_act]
        self.q, self.k, self.v = (Linear(d, d, rngs, axes=("embed", "heads")) for _ in range(3))
        self.out = Linear(d, d, rngs, axes=("heads", "embed"))
        self.norm1, self.norm2 = LayerNorm(d, rngs, eps=c.layer_norm_eps), LayerNorm(d, rngs, eps=c.layer_norm_eps)
        self.up = Linear(d, c.intermediate_size, rngs, axes=("embed", "mlp"))
        self.down = Linear(c.intermediate_size, d, rngs, axes=("mlp", "embed"))
        self.adapter1 = Bottleneck(d, c.bottleneck, rngs) if c.bottleneck else None
        self.adapter2 = Bottleneck(d, c.bottleneck, rngs) if c.bottleneck else None
        self.prefix = Prefix(c.prefix, c.num_attention_heads, d // c.num_attention_heads, rngs) if c.prefix else None

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        b, t, d = x.shape

        def split(y: jax.Array) -> jax.Array:
            return y.reshape(b, t, self.heads, d // self.heads).transpose(0, 2, 1, 3)

        prefix = self.prefix() if self.prefix else None
        y = attend(split(self.q(x)), split(self.k(x)), split(self.v(x)), mask, prefix=prefix)
        y = self.out(y.transpose(0, 2, 1, 3).reshape(b, t, d))
        x = self.norm1(x + (self.adapter1(y) if self.adapter1 else y))
        y = self.down(self.activation(self.up(x)))
        return self.norm2(x + (self.adapter2(y) if self.adapter2 else y))
