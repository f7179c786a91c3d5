"""The text half of CLIP (Radford et al., arXiv 2103.00020; its L, H and bigG sizes): a pre-norm transformer with learned
positions that reads from left to right, pooled at the token that ends the caption."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.errors import UserError
from jaxgen.nn.layers import Embedding, LayerNorm, Linear
from jaxgen.text.architecture import ACTIVATIONS, Head, check_heads, refuse, take
from jaxgen.text.causal import visible
from jaxgen.text.layer import PreNorm
from jaxgen.text.weights import Table, Tensor, layer, linear, norm

PROJECTED = ("CLIPTextModelWithProjection", "CLIPModel")


@dataclass(frozen=True)
class CLIPTextConfig:
    """The defaults are transformers': old files leave out what equals them.

    projected: the pooled vector goes through the projection into the space shared with pictures."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int = 512
    projected: bool = False
    bottleneck: int = 0
    prefix: int = 0
    prefixes: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str, head: Head = "") -> "CLIPTextConfig":
        if head:
            raise UserError(f"{where}: a CLIP text model encodes captions; it has no {head} head")
        refuse(values, where, hidden_act=tuple(ACTIVATIONS))
        chosen = take(values, where, {f.name: f.name for f in fields(cls)[:10]})
        config = cls(**chosen, projected=any(name in PROJECTED for name in values.get("architectures") or ()))
        check_heads(config.hidden_size, config.num_attention_heads, where)
        return config

    @property
    def depth(self) -> int:
        return self.num_hidden_layers

    @property
    def pooled_size(self) -> int:
        return self.projection_dim if self.projected else self.hidden_size

    @property
    def max_length(self) -> int:
        return self.max_position_embeddings

    @property
    def ignored(self) -> tuple[str, ...]:
        """The half that sees pictures, a buffer, and the projection where it is not asked for."""
        always = (r"vision_model\.", r"visual_projection\.", r"logit_scale", r"(text_model\.)?embeddings\.position_ids")
        return always if self.projected else (*always, r"text_projection\.")

    def build(self, rngs: nnx.Rngs) -> "CLIPText":
        return CLIPText(self, rngs)

    def tensors(self) -> Table:
        table = {
            "words.embedding": Tensor("embeddings.token_embedding.weight"),
            "positions.embedding": Tensor("embeddings.position_embedding.weight"),
            **norm("norm", "final_layer_norm"),
        }
        names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"}
        names |= {"norm1": "layer_norm1", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
        for i in range(self.num_hidden_layers):
            table |= layer(f"layers.{i}", f"encoder.layers.{i}", names)
        # Written with the prefix that every version of transformers reads; found without it too.
        table = {ours: replace(t, name=f"text_model.{t.name}", alias=t.name) for ours, t in table.items()}
        return table | (linear("projection", "text_projection", bias=False) if self.projected else {})


class CLIPText(nnx.Module):
    def __init__(self, c: CLIPTextConfig, rngs: nnx.Rngs):
        d = c.hidden_size
        self.config = c
        self.words = Embedding(c.vocab_size, d, rngs, axes=("vocab", "embed"))
        self.positions = Embedding(c.max_position_embeddings, d, rngs)
        sizes: Any = (d, c.num_attention_heads, c.intermediate_size, c.hidden_act)
        more: dict[str, Any] = {"eps": c.layer_norm_eps, "bottleneck": c.bottleneck, "prefix": c.prefix}
        self.layers = nnx.List([PreNorm(*sizes, rngs, **more) for _ in range(c.num_hidden_layers)])
        self.norm = LayerNorm(d, rngs, eps=c.layer_norm_eps)
        if c.projected:
            self.projection = Linear(d, c.projection_dim, rngs, axes=("embed", None), bias=False)

    def __call__(self, ids: jax.Array, mask: jax.Array, dtype: Any = jnp.float32) -> tuple[list[jax.Array], jax.Array]:
        """The last of the states lacks the final norm, which the second result has."""
        slots = jnp.arange(ids.shape[1])
        seen = visible(mask, slots)
        states = [(self.words(ids) + self.positions(slots)).astype(dtype)]
        for each in self.layers:
            states.append(each(states[-1], seen)[0])
        return states, self.norm(states[-1])

    def pool(self, last: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """At the first end token. Files from before transformers 4.31 say 2 for its id, whatever it is; there it is the
        largest id of a caption."""
        end = self.config.eos_token_id
        at = jnp.argmax(ids if end == 2 else ids == end, axis=1)
        pooled = jnp.take_along_axis(last, at[:, None, None], axis=1)[:, 0]
        return self.projection(pooled) if self.config.projected else pooled
