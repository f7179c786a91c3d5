"""A family small enough to reason about: one linear map per group, fitted to the picture's mean."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxgen.families.base import Family, to_uint8


@dataclass(frozen=True)
class Toy(Family):
    """Predicts the mean of each picture from its pooled text; `second` adds a group that sees the first one's output."""

    drawn = ("first",)
    samplers = ("direct",)

    second: bool = False

    @property
    def groups(self):
        return ("first", "second") if self.second else ("first",)

    def init(self, key, shapes):
        w = 0.1 * jax.random.normal(key, (shapes.pooled, 4))
        params = {"first": {"w": w, "out": jnp.ones((4, 1))}}
        return params | ({"second": {"w": jnp.ones(())}} if self.second else {})

    def logical_axes(self, shapes):
        axes = {"first": {"w": ("embed", "mlp"), "out": ("mlp", None)}}
        return axes | ({"second": {"w": ()}} if self.second else {})

    def losses(self, params, frozen, batch, key):
        noise = 0.01 * jax.random.normal(key, batch["image"].shape[:1])
        target = batch["image"].mean((1, 2, 3)) + noise
        predicted = (jnp.tanh(batch["text"].pooled @ params["first"]["w"]) @ params["first"]["out"])[:, 0]
        losses = {"first": (jnp.mean((predicted - target) ** 2), {"bias": jnp.mean(predicted - target)})}
        if self.second:
            losses["second"] = (jnp.mean((params["second"]["w"] - predicted) ** 2), {})
        return losses

    def sample(self, params, frozen, text, null_text, key, settings):
        value = (jnp.tanh(text.pooled @ params["first"]["w"]) @ params["first"]["out"])[:, :, None, None]
        value = jnp.broadcast_to(value, (text.pooled.shape[0], *settings.image))
        return to_uint8(value)

    def flops(self, shapes, tokens):
        return 2.0 * shapes.pooled * 4
