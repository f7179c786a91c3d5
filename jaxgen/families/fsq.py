"""Finite scalar quantisation: each channel is bounded and rounded to one of a few levels (arXiv 2309.15505).

There is no codebook to learn and none to collapse: a position's token is the number whose digits are its channels' levels,
in the mixed radix of `levels`, the first channel's digit counting least."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient

from jaxgen.config import register
from jaxgen.errors import UserError

INSIDE = 0.999  # of half the levels' reach, so that what tanh saturates to still rounds to the outermost level


@register("fsq")
@dataclass(frozen=True)
class FSQ:
    levels: tuple[int, ...] = (8, 5, 5, 5)  # a channel each; the vocabulary is their product

    def validate(self) -> None:
        if not self.levels or min(self.levels) < 3:
            raise UserError(f"family.network.bottleneck.levels={self.levels}: at least one channel, each of 3 levels or more")
        if self.vocab >= 2**31:
            raise UserError(f"family.network.bottleneck.levels={self.levels}: {self.vocab:,} tokens are more than int32 counts")

    @property
    def channels(self) -> int:
        return len(self.levels)

    @property
    def vocab(self) -> int:
        return math.prod(self.levels)

    @property
    def middle(self) -> np.ndarray:
        """The level that 0 is rounded to, int32 [channels]: codes are counted from it, in steps of 1 / it."""
        return np.array(self.levels, np.int32) // 2

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and deviation of codes whose levels are used alike, float32 [channels] each."""
        levels = np.array(self.levels, np.float64)
        mean = ((levels - 1) / 2 - self.middle) / self.middle
        return mean.astype(np.float32), (np.sqrt((levels**2 - 1) / 12) / self.middle).astype(np.float32)

    def bound(self, x: jax.Array) -> jax.Array:
        """Any float [..., channels] -> float32, in steps: what rounds to -middle, …, levels - 1 - middle; 0 stays 0."""
        half = (np.array(self.levels) - 1) / 2 * INSIDE
        # An even number of levels has none in the middle of its range: half a step aside, 0 lies on one.
        offset = np.where(np.array(self.levels) % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half)
        return jnp.tanh(x.astype(jnp.float32) + shift) * half - offset

    def quantise(self, x: jax.Array) -> jax.Array:
        """float [..., channels] -> codes float32 in [-1, 1], rounded; the gradient is that of `bound` (straight through)."""
        bounded = self.bound(x)
        return (bounded + stop_gradient(jnp.round(bounded) - bounded)) / self.middle

    def tokens(self, codes: jax.Array) -> jax.Array:
        """float32 [..., channels], as `quantise` gives them -> int32 [...]."""
        digits = jnp.round(codes * self.middle).astype(jnp.int32) + self.middle
        return jnp.sum(digits * self._places, axis=-1, dtype=jnp.int32)

    def codes(self, tokens: jax.Array) -> jax.Array:
        """The inverse of `tokens`."""
        digits = tokens[..., None] // self._places % np.array(self.levels, np.int32)
        return (digits - self.middle) / jnp.float32(self.middle)

    def nearest(self, codes: jax.Array) -> jax.Array:
        """Any float32 [..., channels] -> the code nearest to it."""
        last = np.array(self.levels) - 1 - self.middle
        return jnp.clip(jnp.round(codes * self.middle), -self.middle, last) / self.middle

    @property
    def _places(self) -> np.ndarray:
        """What a digit of each channel counts, int32 [channels]."""
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)
