"""What every language model's file here provides, and how config.json is read: one frozen dataclass an architecture."""

import math
from typing import Any, ClassVar, Literal, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.errors import UserError
from jaxgen.text.weights import Table

# More than any model has, or building one from a broken config.json would take for ever.
LARGEST, DEEPEST = 2**28, 1024
Head = Literal["", "lm", "classification"]

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5))),  # twice as quick as jax.nn.gelu's erfc
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


class Architecture(Protocol):
    """A model's configuration: it builds the layers and says where their weights lie.

    vocab_size: rows of the table of words; hidden_size: width of a hidden state; depth: layers (there are depth + 1 hidden
    states); pooled_size: width of the pooled vector; max_length: tokens that the model can take; prefixes, ignored: see
    weights.load. bottleneck, prefix: sizes of the additions of nn/adapters.py (0: none), whose weights are in no file."""

    prefixes: ClassVar[tuple[str, ...]]
    bottleneck: int
    prefix: int

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def pooled_size(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str, head: Head = "") -> Self:
        """From the fields of a config.json at `where`; raises UserError for what the architecture does not do."""
        ...

    def build(self, rngs: nnx.Rngs) -> Any:
        """The module. module(ids, mask, dtype) -> (states, last) for int [B, T]: the list of depth + 1 hidden states
        [B, T, D] as transformers' `hidden_states` has them, and its `last_hidden_state`. module.pool(last, ids, mask) ->
        [B, P]. With the head "classification", module.classify(last, ids, mask) -> [B, labels]; with "lm",
        module.logits(last) -> [B, T, V] (and `cache`, see generate.py)."""
        ...

    def tensors(self) -> Table: ...


def take(values: dict[str, Any], where: str, names: dict[str, str], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """{our field: value} of a config.json's fields; `names` maps their names to ours. Null counts as not given.

    Raises UserError naming the required fields that are not there."""
    missing = [name for name in required if values.get(name) is None]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    return {ours: values[theirs] for theirs, ours in names.items() if values.get(theirs) is not None}


def refuse(values: dict[str, Any], where: str, **known: Any) -> None:
    """Raises UserError where a field is given and not one of the values (or the value) done here."""
    for name, allowed in known.items():
        options = allowed if isinstance(allowed, tuple) else (allowed,)
        if values.get(name) is not None and values[name] not in options:
            raise UserError(f"{where}: {name}={values[name]!r} is not supported; {', '.join(map(repr, options))} is")


def check_heads(width: int, heads: int, where: str) -> None:
    if heads < 1 or width % heads:
        raise UserError(f"{where}: a width of {width} does not divide among {heads} attention heads")


def mean_tokens(last: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean of the hidden states of each caption's real tokens, [B, D]."""
    real = (mask > 0)[..., None].astype(last.dtype)
    return (last * real).sum(1) / jnp.maximum(real.sum(1), 1)


def last_token(last: jax.Array, mask: jax.Array) -> jax.Array:
    """The hidden state of each caption's last real token, [B, D]."""
    at = jnp.max(jnp.where(mask > 0, jnp.arange(mask.shape[1]), 0), axis=1)
    return jnp.take_along_axis(last, at[:, None, None], axis=1)[:, 0]
