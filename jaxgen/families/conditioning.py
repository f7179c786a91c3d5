"""How a network takes in its time and its text: one vector per example for adaptive norms, tokens for attention."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.nn.attention import Attention, rotary_1d, rotary_2d
from jaxgen.nn.layers import MLP, Linear, RMSNorm, time_features
from jaxgen.text.features import TextFeatures

TIME_FEATURES = 128
SLOW = 20  # of its TIME_FEATURES / 2 frequencies: those below about 8 half-turns from t = 0 to 1


class Conditioning(nnx.Module):
    """(t, text) -> a vector [B, width] and tokens [B, T, width].

    A frozen language model's features are made for other ends: `refiner` small transformer blocks over the tokens let
    the generator learn its own reading of them (as in SD3's and Lumina's context refiners)."""

    more: "MLPEmbed | None" = None

    def __init__(self, hidden: int, pooled: int, width: int, rngs: nnx.Rngs, *, refiner: int = 0, time: bool = True):
        self.time = MLPEmbed(TIME_FEATURES, width, rngs) if time else None
        self.pooled_norm = RMSNorm(pooled, rngs, learned=False)
        self.pooled = MLPEmbed(pooled, width, rngs)
        self.tokens_norm = RMSNorm(hidden, rngs, learned=False)
        self.tokens = Linear(hidden, width, rngs, axes=(None, "embed"))
        self.blocks = nnx.List([TextBlock(width, rngs) for _ in range(refiner)])
        self.width = width

    def extend(self, count: int, rngs: nnx.Rngs) -> None:
        """From now on t is [B, 1 + count]: a time and further numbers in [0, 1], which count for nothing at first.

        The output may then be differentiated by all of them: fast frequencies are left out (of the time as well), for what
        they add to the output is little, but to its derivative much (as arXiv 2410.11081 found)."""
        self.more = MLPEmbed(2 * SLOW * count, self.width, rngs, zero=True)

    def __call__(self, t: jax.Array | None, text: TextFeatures, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """t [B], or [B, k] after `extend`, or None where there is no `time`; the vector and the tokens are of `dtype`."""
        vector = self.pooled(self.pooled_norm(text.pooled.astype(dtype)))
        if t is None or self.time is None:
            pass  # a network that knows no time
        elif self.more is None:
            vector = self.time(time_features(t, TIME_FEATURES).astype(dtype)) + vector
        else:
            features = time_features(t.reshape(-1), TIME_FEATURES).reshape(*t.shape, 2, -1)  # [B, k, 2, frequencies]
            slow = features[..., :SLOW]
            first = jnp.pad(slow[:, 0], ((0, 0), (0, 0), (0, TIME_FEATURES // 2 - SLOW))).reshape(-1, TIME_FEATURES)
            vector += self.time(first.astype(dtype)) + self.more(slow[:, 1:].reshape(len(t), -1).astype(dtype))
        tokens = self.tokens(self.tokens_norm(text.hidden.astype(dtype)))
        for block in self.blocks:
            tokens = block(tokens, text.mask)
        return jax.nn.silu(vector), tokens


class MLPEmbed(nnx.Module):
    """Features -> width -> silu -> width."""

    def __init__(self, din: int, width: int, rngs: nnx.Rngs, *, zero: bool = False):
        self.first = Linear(din, width, rngs, axes=(None, "embed"))
        self.second = Linear(width, width, rngs, axes=("embed", None), zero=zero)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(jax.nn.silu(self.first(x)))


class TextBlock(nnx.Module):
    """A pre-norm transformer block over text tokens. It is told their order anew: little of it is left in the last
    layer of a language model made for whole sentences, and which colour belongs to which shape hangs on it."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(width, rngs), RMSNorm(width, rngs)
        self.head_dim = 32 if width % 32 == 0 else width
        self.attention = Attention(width, self.head_dim, rngs)
        self.mlp = MLP(width, 2 * width, rngs, zero=True)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask, rotary=rotary_1d(x.shape[1], self.head_dim))
        return x + self.mlp(self.norm2(x))


def attend_map(attention: Attention, x: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """A map [B, h, w, C], each place attending to text tokens [B, T, D] where mask [B, T], and where `attention` has keys
    of its own to all places too, which know where they are -> [B, h, w, C]."""
    b, height, width, c = x.shape
    flat, rotary = x.reshape(b, height * width, c), None
    if attention.own_keys:
        mask = jnp.concatenate([jnp.ones((b, height * width), bool), mask], axis=1)
        rotary = rotary_2d(height, width, attention.q.shape[-1])
    return attention(flat, context=tokens, mask=mask, rotary=rotary).reshape(x.shape)


def attend_map_flops(places: int, width: int, text: int, tokens: int, joint: bool) -> int:
    """Of `attend_map` for one image, text tokens being `text` wide."""
    own = places if joint else 0  # keys of the image
    return 2 * 2 * width * (width * (places + own) + text * tokens + places * (own + tokens))
