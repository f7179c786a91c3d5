"""GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): causal, pre-norm, learned positions."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.errors import UserError
from jaxgen.nn.layers import Embedding, LayerNorm, Linear
from jaxgen.text.architecture import ACTIVATIONS, Head, check_heads, refuse, take
from jaxgen.text.causal import Cache, LanguageModel, empty_cache, places, visible
from jaxgen.text.layer import PreNorm
from jaxgen.text.weights import Table, Tensor, linear, norm


@dataclass(frozen=True)
class GPT2Config:
    """scale_attn_weights: by 1 / sqrt(head size); scale_attn_by_inverse_layer_idx: by 1 / (layer + 1) besides."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    head: Head = ""
    bottleneck: int = 0
    prefix: int = 0
    prefixes: ClassVar[tuple[str, ...]] = ("transformer.",)

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str, head: Head = "") -> "GPT2Config":
        if head == "classification":
            raise UserError(f"{where}: of a gpt2 the language model is read; it has no classification head")
        refuse(values, where, add_cross_attention=False, activation_function=tuple(ACTIVATIONS))
        names = [f.name for f in fields(cls)[:11]]
        given = take(values, where, {name: name for name in names}, tuple(names[:5]))
        config = cls(**{"n_inner": 4 * given["n_embd"]} | given, head=head)
        check_heads(config.n_embd, config.n_head, where)
        return config

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def pooled_size(self) -> int:
        return self.n_embd

    @property
    def depth(self) -> int:
        return self.n_layer

    @property
    def max_length(self) -> int:
        return self.n_positions

    @property
    def ignored(self) -> tuple[str, ...]:
        """Buffers, other heads, and the head where it is not asked for or is the table of words again."""
        always = (r"h\.\d+\.attn\.(masked_)?bias", r"score\.", r"multiple_choice_head\.")
        return always if self.head and not self.tie_word_embeddings else (*always, r"lm_head\.")

    def build(self, rngs: nnx.Rngs) -> "GPT2":
        return GPT2(self, rngs)

    def tensors(self) -> Table:
        table = {
            "words.embedding": Tensor("wte.weight"),
            "positions.embedding": Tensor("wpe.weight"),
            **norm("norm", "ln_f"),
        }
        for i in range(self.n_layer):
            table |= norm(f"layers.{i}.norm1", f"h.{i}.ln_1") | norm(f"layers.{i}.norm2", f"h.{i}.ln_2")
            for ours, theirs, part in (
                *((name, "attn.c_attn", (at, 3)) for at, name in enumerate("qkv")),
                ("out", "attn.c_proj", (0, 1)),
                ("up", "mlp.c_fc", (0, 1)),
                ("down", "mlp.c_proj", (0, 1)),
            ):
                # Its linear layers are stored as ours are: [in, out].
                table[f"layers.{i}.{ours}.kernel"] = Tensor(f"h.{i}.{theirs}.weight", part=part)
                table[f"layers.{i}.{ours}.bias"] = Tensor(f"h.{i}.{theirs}.bias", part=part)
        if self.head and not self.tie_word_embeddings:
            table |= linear("lm_head", "lm_head", bias=False)
        return table


class GPT2(LanguageModel):
    def __init__(self, c: GPT2Config, rngs: nnx.Rngs):
        self.config = c
        self.words = Embedding(c.vocab_size, c.n_embd, rngs, axes=("vocab", "embed"))
        self.positions = Embedding(c.n_positions, c.n_embd, rngs)
        self.layers = nnx.List([self._layer(c, i, rngs) for i in range(c.n_layer)])
        self.norm = LayerNorm(c.n_embd, rngs, eps=c.layer_norm_epsilon)
        untied = c.head and not c.tie_word_embeddings
        self.lm_head = Linear(c.n_embd, c.vocab_size, rngs, axes=("embed", "vocab"), bias=False) if untied else None

    def __call__(
        self, ids: jax.Array, mask: jax.Array, dtype: Any = jnp.float32, cache: Cache | None = None, start: Any = 0
    ) -> Any:
        """(states, last), or with a cache (states, last, cache): as decoder.Decoder's."""
        slots, positions, _ = places(ids, mask, cache, start)
        seen = visible(mask, slots)
        x = (self.words(ids) + self.positions(positions)).astype(dtype)
        return self.through(x, cache, lambda i, layer, x, pair: layer(x, seen, pair, start))

    def empty_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
        c = self.config
        return empty_cache(c.n_layer, batch, c.n_head, length, c.n_embd // c.n_head, dtype)

    @staticmethod
    def _layer(c: GPT2Config, index: int, rngs: nnx.Rngs) -> PreNorm:
        scale = (c.n_embd // c.n_head) ** -0.5 if c.scale_attn_weights else 1.0
        if c.scale_attn_by_inverse_layer_idx:
            scale /= index + 1
        sizes: Any = (c.n_embd, c.n_head, c.n_inner, c.activation_function)
        more: dict[str, Any] = {"eps": c.layer_norm_epsilon, "bottleneck": c.bottleneck, "prefix": c.prefix}
        return PreNorm(*sizes, rngs, **more, scale=scale)
