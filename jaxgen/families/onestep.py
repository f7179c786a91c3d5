"""One-step flow: a flow map learned with the MeanFlow identity.

Differentiating (t - r) u, the way from t to r, by t along the path gives the average velocity's identity
v = u + (t - r) du/dt with du/dt = v ∂u/∂x + ∂u/∂t (Geng et al., arXiv 2505.13447). The loss is the squared error of the
right side's velocity, du/dt held constant and its v the network's own u(x_t, t, t), so that the right side is a function
of x_t alone (arXiv 2512.02012).

With dx̂/dt the derivative of FlowMap's clean picture along the path t du/dt = v - u - dx̂/dt, and with s = (t - r) / t and
t v = x_t - x̂(x_t, t, t) the right side's own clean picture is

    x_t - t (u + (t - r) du/dt) = x̂ + s (t dx̂/dt - x̂(x_t, r, t) + x̂(x_t, t, t)),

the bracket held constant. It is compared with the picture and weighed as in Flow (at r = t this is Flow's loss), then
adaptively.

Trained from pictures the clean picture of the guided velocity is
x + (1 - 1/w) (x̂(x_t, t, t, w, text) - x̂(x_t, t, t, 1, no text)), whose fixed point is guidance by w (arXiv 2512.02012).
With a teacher its guided prediction stands both for x and for x̂(x_t, t, t): targets free of noise."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Losses, Shapes
from jaxgen.families.flow import noisy
from jaxgen.families.flow_map import FlowMap, times, wide
from jaxgen.nn.attention import plain_attention
from jaxgen.nn.module import Params, dtype_of
from jaxgen.text.features import TextFeatures


@register("onestep")
@dataclass(frozen=True)
class OneStep(FlowMap):
    null_share: float = 0.1  # of captions left out in training, for guidance to lead away from (without a teacher)
    time_uniform: float = 1.0  # what a step learns at t it takes from the steps below it: all of them count alike
    equal_share: float = 0.6  # of steps of no length, r = t: plain flow matching, which the rest hang on
    whole_share: float = 0.1  # of steps to the end, r = 0; for the others r is uniform in [0, t]
    loss_power: float = 0.5  # a picture's loss e counts e / (e + loss_offset)^loss_power; 0 is the squared error
    loss_offset: float = 1e-3

    def validate(self) -> None:
        super().validate()
        if not (0 <= self.null_share < 1 and min(self.equal_share, self.whole_share) >= 0):
            raise UserError("family.null_share, family.equal_share and family.whole_share are shares: give numbers from 0 to 1")
        if self.equal_share + self.whole_share > 1:
            raise UserError(f"family.equal_share + family.whole_share = {self.equal_share + self.whole_share} exceeds 1")
        if not 0 <= self.loss_power <= 1 or self.loss_offset <= 0:
            raise UserError("family.loss_power lies in [0, 1] and family.loss_offset is positive")

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        image, text = self.clean(frozen, batch, key), batch["text"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        length_key, scale_key, null_key = jax.random.split(jax.random.fold_in(key, 3), 3)
        t = self.draw_times(time_key, image.shape[0])
        s = self.draw_lengths(length_key, image.shape[0])
        scale = jax.random.uniform(scale_key, t.shape, minval=self.guidance[0], maxval=self.guidance[1])
        if self.teacher_flow is None:
            dropped = jax.random.uniform(null_key, t.shape) < self.null_share
            scale = jnp.where(dropped, 1.0, scale)
            text = jax.tree.map(lambda a, b: jnp.where(wide(dropped, a), b, a), text, _no_text(text))
        x_t, length = noisy(image, t, noise_key), wide(s, image)
        here, target = jax.lax.stop_gradient(self._velocity_and_target(params, frozen, image, x_t, t, scale, text))

        def predict(x: jax.Array, told: jax.Array) -> jax.Array:
            return self._predict(params, x, told, text, dropout_key)

        # t times the movement along the path: of x_t, and of t, t - r and the guidance.
        moves = x_t - here, jnp.stack([t, t, 0 * t], axis=-1)
        with plain_attention():
            clean, along = jax.jvp(predict, (x_t, times(t, s, scale)), moves)
        right = clean + jax.lax.stop_gradient(length * (along - clean + here))
        error = jnp.mean(jnp.square(right - target), axis=(1, 2, 3))
        weighed = error / jnp.square(jnp.maximum(t, self.loss_min_time))
        loss = weighed * jax.lax.stop_gradient((weighed + self.loss_offset) ** -self.loss_power)
        return {"generator": (jnp.mean(loss), {"clean_mse": jnp.mean(error)})}

    def _velocity_and_target(
        self,
        params: Params,
        frozen: Params,
        image: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        scale: jax.Array,
        text: TextFeatures,
    ) -> tuple[jax.Array, jax.Array]:
        """Clean pictures that give the guided velocity at x_t, and the loss's target."""
        if self.teacher_flow is not None:
            clean = self._taught(frozen, x_t, t, scale, text, dtype_of(params["generator"]))
            return clean, clean
        own = self._predict(params, x_t, times(t, 0.0 * t, scale), text)
        if not self._guided:
            return own, image
        without = self._predict(params, x_t, times(t, 0.0 * t, jnp.ones_like(t)), _no_text(text))
        return own, image + (1.0 - 1.0 / wide(scale, image)) * (own - without)

    def draw_lengths(self, key: jax.Array, count: int) -> jax.Array:
        """float32 [count]: (t - r) / t, of which equal_share are 0 and whole_share 1, the rest uniform between."""
        choice_key, uniform_key = jax.random.split(key)
        choice = jax.random.uniform(choice_key, (count,))
        uniform = jax.random.uniform(uniform_key, (count,))
        whole = choice >= 1.0 - self.whole_share
        return jnp.where(choice < self.equal_share, 0.0, jnp.where(whole, 1.0, uniform))

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """The target's passes, then forward with its derivative (of like cost) and backward."""
        of_target = self if self.teacher_flow is None else self.teacher_flow
        return 4.0 * self.flops(shapes, tokens) + (1.0 + self._guided) * of_target.flops(shapes, tokens)


def _no_text(text: TextFeatures) -> TextFeatures:
    """What stands for no caption where the text encoder's own is not at hand: a single token, all zero."""
    only = jnp.broadcast_to(jnp.arange(text.mask.shape[1]) == 0, text.mask.shape)
    return TextFeatures(jnp.zeros_like(text.hidden), jnp.zeros_like(text.pooled), only)
