"""Rotary positions (Su et al., arXiv 2104.09864) of language models and the ways to stretch them over longer texts."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError

KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class Rotary:
    """frequencies: radians a position, one a pair of a head's numbers. scale: of cos and sin. longer: other frequencies for
    rows of more than `limit` tokens (arXiv 2402.13753). stretch: rows of more than `limit` tokens turn more slowly, the more
    the longer they are; up to limit * stretch they are understood ("dynamic" NTK scaling, see arXiv 2309.00071, A.1)."""

    frequencies: tuple[float, ...]
    scale: float = 1.0
    longer: tuple[float, ...] = ()
    limit: int = 0
    stretch: float = 1.0

    def tables(self, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cos, sin), each float32 [R or B, 1, T, d/2], for positions int [R, T] (R is 1 or B) of rows of lengths [B].

        A row's own length counts, transformers takes the longest of the batch: a row's outcome is what it would be alone."""
        turns = jnp.asarray(self.frequencies, jnp.float32)
        if self.longer:
            longer = jnp.asarray(self.longer, jnp.float32)
            turns = jnp.where((lengths > self.limit)[:, None, None], longer, turns)
        if self.stretch > 1:
            # The base grows by r^(d / (d - 2)), which turns the slowest pair r times more slowly and the fastest as before.
            r = self.stretch * jnp.maximum(lengths / self.limit, 1.0) - (self.stretch - 1.0)
            pairs = len(self.frequencies)
            turns = turns * r[:, None, None] ** (-jnp.arange(pairs) / max(pairs - 1, 1))
        angles = (positions[..., None] * turns)[:, None]
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def read(values: dict[str, Any], where: str, head_dim: int, *, layer: str = "full_attention") -> Rotary:
    """From a config.json's fields: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`, which may hold one
    object a type of layer. Raises UserError naming what is missing or not done here."""
    given = values.get("rope_parameters") or {}
    given = (given[layer] or {} if layer in given else given) | (values.get("rope_scaling") or {})
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "mrope":  # several axes, which agree on text
        kind = "default"
    if kind not in KINDS:
        raise UserError(f"{where}: rotary positions of type {kind!r} are not supported; {', '.join(KINDS)} are")
    if (given.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor is not supported; all of a head's numbers turn")

    def number(name: str, default: float | None = None) -> float:
        value = default if given.get(name) is None else given[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise UserError(f"{where}: {name}={value!r} of the rotary positions must be a positive number")
        return value

    limit = values["max_position_embeddings"]
    given = {"rope_theta": values.get("rope_theta") or 10_000.0, **given}
    theta, pairs = number("rope_theta"), head_dim // 2
    turns = theta ** (-np.arange(pairs) / pairs)
    if values.get("original_max_position_embeddings") is not None:
        given["original_max_position_embeddings"] = values["original_max_position_embeddings"]
    if kind == "default":
        return Rotary(_tuple(turns))
    if kind == "linear":
        return Rotary(_tuple(turns / number("factor")))
    if kind == "dynamic":
        return Rotary(_tuple(turns), limit=limit, stretch=max(number("factor"), 1.0))
    original = number("original_max_position_embeddings", limit)
    if kind == "llama3":
        factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise UserError(f"{where}: high_freq_factor={high} must be greater than low_freq_factor={low}")
        share = np.clip((original * turns / (2 * math.pi) - low) / (high - low), 0, 1)
        return Rotary(_tuple(turns * ((1 - share) / factor + share)))
    factor = number("factor", limit / original)
    if kind == "longrope":
        scale = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original)) if factor > 1 else 1.0
        short, long = (np.array(given.get(name) or [], float) for name in ("short_factor", "long_factor"))
        if short.shape != (pairs,) or long.shape != (pairs,) or not (short > 0).all() or not (long > 0).all():
            raise UserError(f"{where}: short_factor and long_factor must be {pairs} positive numbers each")
        return Rotary(_tuple(turns / short), number("attention_factor", scale), _tuple(turns / long), min(int(original), limit))
    return _yarn(turns, theta, factor, original, given, number)


def _yarn(turns: np.ndarray, theta: float, factor: float, original: float, given: dict[str, Any], number: Any) -> Rotary:
    """YaRN (Peng et al., arXiv 2309.00071): pairs that turn often within the original length stay, the others turn `factor`
    times more slowly, and a ramp is between; cos and sin grow, which sharpens attention."""

    def pair(rotations: float) -> float:
        """Which pair turns so often within the original length."""
        return len(turns) * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    def sharper(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    first, last = pair(number("beta_fast", 32)), pair(number("beta_slow", 1))
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(turns) - 1)
    ramp = np.clip((np.arange(len(turns)) - first) / ((last - first) or 0.001), 0, 1)
    scale = sharper(1.0)
    if given.get("mscale") and given.get("mscale_all_dim"):
        scale = sharper(number("mscale")) / sharper(number("mscale_all_dim"))
    return Rotary(_tuple(turns * (1 - ramp + ramp / factor)), number("attention_factor", scale))


def _tuple(turns: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, turns))
