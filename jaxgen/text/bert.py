"""BERT (Devlin et al., arXiv 1810.04805) and its kin: RoBERTa (arXiv 1907.11692), XLM-RoBERTa (arXiv 1911.02116) and
DistilBERT (arXiv 1910.01108): post-norm transformers with learned positions that read in both directions."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.errors import UserError
from jaxgen.nn.layers import Embedding, LayerNorm, Linear
from jaxgen.text.architecture import ACTIVATIONS, Head, check_heads, refuse, take
from jaxgen.text.layer import PostNorm
from jaxgen.text.weights import Table, Tensor, layer, linear, norm

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
            named = values.get("architectures") or ["ForSequenceClassification"]
            if not any("ForSequenceClassification" in name for name in named):
                raise UserError(f"{where}: a {named[0]} has no classification head; a …ForSequenceClassification has")
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
        where = "encoder.layer"
        if self.kind == "distilbert":
            where = "transformer.layer"
            names = {ours: f"attention.{ours}_lin" for ours in ("q", "k", "v", "out")}
            names |= {"norm1": "sa_layer_norm", "up": "ffn.lin1", "down": "ffn.lin2", "norm2": "output_layer_norm"}
        for i in range(self.num_hidden_layers):
            table |= layer(f"layers.{i}", f"{where}.{i}", names)
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
        sizes: Any = (d, c.num_attention_heads, c.intermediate_size, c.hidden_act)
        more: dict[str, Any] = {"eps": c.layer_norm_eps, "bottleneck": c.bottleneck, "prefix": c.prefix}
        self.layers = nnx.List([PostNorm(*sizes, rngs, **more) for _ in range(c.num_hidden_layers)])
        if c.head == "classification":
            self.dense = Linear(d, d, rngs, axes=("embed", None))
            self.labels = Linear(d, c.num_labels, rngs, axes=("embed", None))

    def __call__(
        self, ids: jax.Array, mask: jax.Array, dtype: Any = jnp.float32, types: jax.Array | None = None
    ) -> tuple[list[jax.Array], jax.Array]:
        """types: int [B, T], 1 for the second of two sentences; only BERT itself tells them apart."""
        states = [self.embed(ids, mask, dtype, types)]
        for each in self.layers:
            states.append(each(states[-1], mask > 0))
        return states, states[-1]

    def embed(self, ids: jax.Array, mask: jax.Array, dtype: Any, types: jax.Array | None = None) -> jax.Array:
        positions = jnp.arange(ids.shape[1])
        if self.config.kind == "roberta":
            real = mask.astype(jnp.int32)
            positions = jnp.cumsum(real, axis=1) * real + self.config.pad_token_id
        x = self.words(ids) + self.positions(positions)
        if self.config.kind != "distilbert":
            x = x + self.types(jnp.int32(0) if types is None or self.config.kind != "bert" else types)
        return self.norm(x).astype(dtype)

    def pool(self, last: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return last[:, 0]  # CLS

    def classify(self, last: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        squash = jax.nn.relu if self.config.kind == "distilbert" else jnp.tanh
        return self.labels(squash(self.dense(last[:, 0])))
