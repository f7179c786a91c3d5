"""Drawing in steps, from noise to a picture, and guidance in each of them: the same whatever a step is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.families.base import SampleSettings
from jaxgen.text.features import TextFeatures

# step(i, x) -> (x after the i-th step, the clean picture as it was seen from before it)
Step = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def walk(step: Step, count: Any, begin: jax.Array) -> jax.Array:
    """x after `count` steps (traced) from `begin`."""
    x, _ = jax.lax.fori_loop(0, count, lambda i, state: step(i, state[0]), (begin, begin))
    return x


def watch(step: Step, count: Any, begin: jax.Array, frames: int, show: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[frames, ...]: `show` of the clean pictures seen on the way of `walk`, ever later; the last is of where it ends."""
    bounds = jnp.round(jnp.linspace(0, count, frames + 1)).astype(jnp.int32)

    def frame(state: tuple[jax.Array, jax.Array], k: jax.Array):
        state = jax.lax.fori_loop(bounds[k], bounds[k + 1], lambda i, state: step(i, state[0]), state)
        return state, show(state[1])

    (x, _), seen = jax.lax.scan(frame, (begin, begin), jnp.arange(frames))
    return seen.at[-1].set(show(x))


def guided(network: Callable[..., jax.Array], text: TextFeatures, null_text: TextFeatures, settings: SampleSettings) -> Any:
    """predict(x [B, ...], at, t) -> network(x, at [B], text), led away from what it says of `null_text`
    (arXiv 2207.12598); outside of the interval of t, and at scale 1, in one pass. at: what the network is told of t."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text, null_text)

    def predict(x: jax.Array, at: jax.Array, t: jax.Array) -> jax.Array:
        def plain() -> jax.Array:
            return network(x, jnp.full(x.shape[:1], at), text)

        def led() -> jax.Array:
            twice = jnp.concatenate([x, x])
            given, null = jnp.split(network(twice, jnp.full(twice.shape[:1], at), both), 2)
            return null + settings.guidance_scale * (given - null)

        inside = (t >= settings.guidance_low) & (t <= settings.guidance_high) & (settings.guidance_scale != 1.0)
        return jax.lax.cond(inside, led, plain)

    return predict
