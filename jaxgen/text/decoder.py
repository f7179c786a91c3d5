"""Causal transformers with rotary positions, gated MLPs and RMS norms: Llama 2 and 3 (arXiv 2307.09288, 2407.21783), Mistral
(arXiv 2310.06825), Qwen2 and 3 (arXiv 2407.10671, 2505.09388), SmolLM, Gemma 1 to 3 (arXiv 2403.08295, 2408.00118, 2503.19786)
and the text stacks of Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL, whose positions on several axes agree on text."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.errors import UserError
from jaxgen.nn.adapters import Bottleneck, Prefix
from jaxgen.nn.attention import attend, merge_heads, rotate, split_heads
from jaxgen.nn.layers import Embedding, Linear, RMSNorm
from jaxgen.text import rotary
from jaxgen.text.architecture import ACTIVATIONS, DEEPEST, Head, refuse, take
from jaxgen.text.causal import Cache, LanguageModel, Pair, empty_cache, places, remember, visible
from jaxgen.text.rotary import Rotary
from jaxgen.text.weights import Table, Tensor, linear, norm

GEMMA = {"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA2 = GEMMA | {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
# What a config.json that does not say it means, in transformers: published ones leave much out, Gemma 3's most of all.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    "gemma": GEMMA | {"num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": GEMMA2
    | {"vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "max_position_embeddings": 131_072, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    "qwen2_5_vl": {"num_key_value_heads": 8, "sliding_window": 4096, "max_window_layers": 80}
    | {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "qwen3_vl": {"num_key_value_heads": 32, "head_dim": 128, "rope_theta": 5e5},
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class DecoderConfig:
    """windows: how many tokens, itself included, each layer's token looks back on; 0 is all. rotaries: each layer's rotary
    positions; None is none. scale: of attention's logits. caps: tanh bounds of attention's and of the final logits, 0 is none.

    qk_norm: queries and keys are normalised. gemma: norms multiply by 1 + scale, words by sqrt(hidden_size). sandwich: norms
    also after attention and MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int, ...]
    rotaries: tuple[Rotary | None, ...]
    scale: float
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    attention_cap: float = 0.0
    final_cap: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False
    sandwich: bool = False
    tied: bool = False
    head: Head = ""
    bottleneck: int = 0
    prefix: int = 0
    prefixes: ClassVar[tuple[str, ...]] = ("model.language_model.", "language_model.model.", "language_model.", "model.")

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str, head: Head = "") -> "DecoderConfig":
        kind = values["model_type"] if values["model_type"] in DEFAULTS else values["model_type"].removesuffix("_text")
        if head == "classification":
            raise UserError(f"{where}: of a {kind} the language model is read; it has no classification head")
        values = DEFAULTS[kind] | values
        later, always = kind in ("gemma2", "gemma3_text"), kind in ("qwen2", "qwen2_5_vl")
        act = "hidden_activation" if later else "hidden_act"
        if kind == "gemma" and values[act] == "gelu":  # the first files say so and mean the other one
            values = values | {act: "gelu_pytorch_tanh"}
        refuse(values, where, **{act: tuple(ACTIVATIONS)}, use_bidirectional_attention=False)
        sizes = take(values, where, {n: n for n in (*SIZES, "max_position_embeddings")}, (*SIZES, "max_position_embeddings"))
        heads, layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        kv_heads = values.get("num_key_value_heads") or heads
        head_dim = values.get("head_dim") or sizes["hidden_size"] // heads
        if heads % kv_heads:
            raise UserError(f"{where}: {heads} attention heads do not divide among {kv_heads} of keys and values")
        if not 2 <= head_dim <= 2**16 or head_dim % 2:
            raise UserError(f"{where}: rotary positions need a head_dim that is even and at most 65536, not {head_dim}")
        if layers > DEEPEST:
            raise UserError(f"{where}: {layers} layers are no model's")
        bias = values.get("attention_bias", False) and kind != "mistral" and not always
        more = take(values, where, {"rms_norm_eps": "rms_norm_eps", act: "activation"})
        return cls(
            **sizes,
            **more,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            windows=_windows(values, where, kind, layers),
            rotaries=_rotaries(values, where, kind, layers, head_dim),
            scale=(values["query_pre_attn_scalar"] if later else head_dim) ** -0.5,
            attention_cap=(later and values.get("attn_logit_softcapping")) or 0.0,
            final_cap=(later and values.get("final_logit_softcapping")) or 0.0,
            qkv_bias=bias or always,
            out_bias=bias,
            mlp_bias=values.get("mlp_bias", False) and kind in ("llama", "smollm3"),
            qk_norm=kind in ("qwen3", "qwen3_vl", "gemma3_text"),
            gemma=kind.startswith("gemma"),
            sandwich=later,
            tied=bool(values.get("tie_word_embeddings")),
            head=head,
        )

    @property
    def depth(self) -> int:
        return self.num_hidden_layers

    @property
    def pooled_size(self) -> int:
        return self.hidden_size

    @property
    def max_length(self) -> int:
        return int(self.max_position_embeddings * max(r.stretch if r else 1.0 for r in self.rotaries))

    @property
    def ignored(self) -> tuple[str, ...]:
        """Buffers, what sees pictures, and the head where it is not asked for or is the table of words again."""
        always = (r"(.*\.)?rotary_emb\.", r"visual\.", r"vision_", r"multi_modal_projector\.", r"score\.")
        return always if self.head and not self.tied else (*always, r"lm_head\.")

    def build(self, rngs: nnx.Rngs) -> "Decoder":
        return Decoder(self, rngs)

    def tensors(self) -> Table:
        table = {"words.embedding": Tensor("embed_tokens.weight"), **norm("norm", "norm", bias=False)}
        norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        if self.sandwich:
            norms |= {"norm2": "pre_feedforward_layernorm"}
            norms |= {"after1": "post_attention_layernorm", "after2": "post_feedforward_layernorm"}
        if self.qk_norm:
            norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        biases = {"q": self.qkv_bias, "k": self.qkv_bias, "v": self.qkv_bias, "o": self.out_bias}
        for i in range(self.num_hidden_layers):
            for ours, theirs in norms.items():
                table |= norm(f"layers.{i}.{ours}", f"layers.{i}.{theirs}", bias=False)
            for name, bias in biases.items():
                ours = "out" if name == "o" else name
                table |= linear(f"layers.{i}.{ours}", f"layers.{i}.self_attn.{name}_proj", bias=bias)
            for name in ("gate", "up", "down"):
                table |= linear(f"layers.{i}.{name}", f"layers.{i}.mlp.{name}_proj", bias=self.mlp_bias)
        if self.head and not self.tied:
            table |= linear("lm_head", "lm_head", bias=False)
        return table


class Decoder(LanguageModel):
    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        self.config = c
        self.words = Embedding(c.vocab_size, c.hidden_size, rngs, axes=("vocab", "embed"))
        self.layers = nnx.List([Layer(c, rngs) for _ in range(c.num_hidden_layers)])
        self.norm = RMSNorm(c.hidden_size, rngs, shifted=c.gemma, eps=c.rms_norm_eps)
        untied = c.head and not c.tied
        self.lm_head = Linear(c.hidden_size, c.vocab_size, rngs, axes=("embed", "vocab"), bias=False) if untied else None

    def __call__(
        self, ids: jax.Array, mask: jax.Array, dtype: Any = jnp.float32, cache: Cache | None = None, start: Any = 0
    ) -> Any:
        """(states, last) of ids int [B, T] padded at the end. With a cache of S slots, ids are those of the slots from
        `start` on, mask [B, S] says which slots are real (padding in front), and the result is (states, last, cache)."""
        c = self.config
        slots, positions, lengths = places(ids, mask, cache, start)
        masks = {window: visible(mask, slots, window) for window in set(c.windows)}
        tables = {r: r.tables(positions, lengths) if r else None for r in set(c.rotaries)}
        x = self.words(ids).astype(dtype)
        x = x * jnp.asarray(c.hidden_size**0.5, dtype) if c.gemma else x

        def call(i: int, layer: Any, x: jax.Array, pair: Pair | None) -> tuple[jax.Array, Pair]:
            return layer(x, masks[c.windows[i]], tables[c.rotaries[i]], pair, start)

        return self.through(x, cache, call)

    def empty_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Cache:
        c = self.config
        return empty_cache(c.num_hidden_layers, batch, c.num_key_value_heads, length, c.head_dim, dtype)

    def logits(self, last: jax.Array) -> jax.Array:
        cap, out = self.config.final_cap, super().logits(last)
        return cap * jnp.tanh(out / cap) if cap else out


class Layer(nnx.Module):
    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        d, own, shared = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.heads, self.kv_heads, self.activation = c.num_attention_heads, c.num_key_value_heads, ACTIVATIONS[c.activation]
        self.scale, self.cap = c.scale, c.attention_cap

        def scaled(size: int) -> nnx.Module:
            return RMSNorm(size, rngs, shifted=c.gemma, eps=c.rms_norm_eps)

        self.norm1, self.norm2 = scaled(d), scaled(d)
        self.after1, self.after2 = (scaled(d), scaled(d)) if c.sandwich else (None, None)
        self.q_norm, self.k_norm = (scaled(c.head_dim), scaled(c.head_dim)) if c.qk_norm else (None, None)
        self.q = Linear(d, own, rngs, axes=("embed", "heads"), bias=c.qkv_bias)
        self.k, self.v = (Linear(d, shared, rngs, axes=("embed", "heads"), bias=c.qkv_bias) for _ in range(2))
        self.out = Linear(own, d, rngs, axes=("heads", "embed"), bias=c.out_bias)
        self.gate, self.up = (Linear(d, c.intermediate_size, rngs, axes=("embed", "mlp"), bias=c.mlp_bias) for _ in range(2))
        self.down = Linear(c.intermediate_size, d, rngs, axes=("mlp", "embed"), bias=c.mlp_bias)
        self.adapter1, self.adapter2 = Bottleneck(d, c.bottleneck, rngs), Bottleneck(d, c.bottleneck, rngs)
        self.prefix = Prefix(c.prefix, c.num_key_value_heads, c.head_dim, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, tables: Any, cache: Pair | None, start: Any) -> tuple[jax.Array, Pair]:
        y = self.norm1(x)
        q, k, v = split_heads(self.q(y), self.heads), *(split_heads(p(y), self.kv_heads) for p in (self.k, self.v))
        if self.q_norm and self.k_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        k, v = new = remember(cache, k, v, start)
        y = attend(q, k, v, mask, scale=self.scale, softcap=self.cap, prefix=self.prefix())
        y = self.adapter1(self.out(merge_heads(y)))
        x = x + (self.after1(y) if self.after1 else y)
        y = self.norm2(x)
        y = self.adapter2(self.down(self.activation(self.gate(y)) * self.up(y)))
        return x + (self.after2(y) if self.after2 else y), new


def _windows(values: dict[str, Any], where: str, kind: str, layers: int) -> tuple[int, ...]:
    """Each layer's window, from what the kinds call it."""
    window, given = values.get("sliding_window") or 0, values.get("layer_types")
    sliding = [False] * layers
    if kind == "mistral":
        sliding = [window > 0] * layers
    elif kind in ("llama", "gemma", "qwen3_vl"):
        pass
    elif given is not None:
        if len(given) != layers or not {*given} <= {"full_attention", "sliding_attention"}:
            raise UserError(f"{where}: layer_types must be full_attention or sliding_attention for each of {layers} layers")
        sliding = [name == "sliding_attention" for name in given]
    elif kind == "gemma2":
        sliding = [i % 2 == 0 for i in range(layers)]
    elif kind == "gemma3_text":
        pattern = values.get("sliding_window_pattern") or values.get("_sliding_window_pattern") or 6
        sliding = [(i + 1) % pattern > 0 for i in range(layers)]
    elif values.get("use_sliding_window") and window:
        turning = _turning(values, where, kind, layers)
        sliding = [not on if kind == "smollm3" else i >= values["max_window_layers"] for i, on in enumerate(turning)]
    if any(sliding) and not (isinstance(window, int) and 1 <= window < 2**31):
        raise UserError(f"{where}: layers with sliding attention need a sliding_window, not {window!r}")
    return tuple(window if on else 0 for on in sliding)


def _rotaries(values: dict[str, Any], where: str, kind: str, layers: int, head_dim: int) -> tuple[Rotary | None, ...]:
    """Each layer's rotary positions: Gemma 3's sliding layers have their own, some of SmolLM3's have none."""
    full = rotary.read(values, where, head_dim)
    if kind == "gemma3_text":
        near = values | {"rope_theta": values["rope_local_base_freq"], "rope_scaling": None}
        local = rotary.read(near, where, head_dim, layer="sliding_attention")
        return tuple(local if window else full for window in _windows(values, where, kind, layers))
    return tuple(full if on else None for on in _turning(values, where, kind, layers))


def _turning(values: dict[str, Any], where: str, kind: str, layers: int) -> list[bool]:
    """Which layers have rotary positions."""
    given, interval = values.get("no_rope_layers"), values.get("no_rope_layer_interval") or 4
    if kind != "smollm3":
        return [True] * layers
    if given is not None and len(given) < layers:
        raise UserError(f"{where}: no_rope_layers must have a 0 or 1 for each of {layers} layers")
    return [bool(on) for on in given[:layers]] if given is not None else [(i + 1) % interval > 0 for i in range(layers)]
