"""Flow matching: a straight path from picture to noise, x_t = (1 - t) x + t noise, t in [0, 1].

The network predicts the clean picture, which gives the velocity (x_t - x̂) / max(t, 0.05); the loss is the velocity's, its
weight bounded at small t so that every noise level has a like share of it (Lipman et al., arXiv 2210.02747; Liu et al.,
arXiv 2209.03003; clean-picture prediction: Li and He, arXiv 2511.13720; logit-normal times: Esser et al., arXiv 2403.03206).

With a `codec` x is not the picture but its latent, all the rest is the same (Rombach et al., arXiv 2112.10752)."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Family, Losses, SampleSettings, Shapes, noise, to_uint8
from jaxgen.families.codec import Image, Pretrained, draw
from jaxgen.families.steps import Step, guided, walk, watch
from jaxgen.families.transformer import Transformer
from jaxgen.families.unet import UNet
from jaxgen.nn.module import Params, bind, dtype_of, init_params, logical_axes
from jaxgen.text.features import TextFeatures

POSTERIOR = 10  # the stream of a latent's draw; the lower numbers are those that `split` gives out
MIN_TIME = 0.05  # below this the velocity is not divided by t any further


@register("flow")
@dataclass(frozen=True)
class Flow(Family):
    samplers: ClassVar = ("heun", "euler")

    network: UNet | Transformer = field(default_factory=UNet)
    codec: Pretrained | None = None  # whose latents are drawn; None: the pixels themselves
    time_mean: float = 0.0  # of the logit-normal distribution of t; larger trains more on noisy pictures
    time_std: float = 1.0
    time_uniform: float = 0.1  # share of times drawn uniformly, so that both ends are seen
    sample_shift: float = 1.0  # > 1 spends more of a sampler's steps at high noise (arXiv 2403.03206, eq. 23)
    loss_min_time: float = 0.2  # the loss weighs 1 / max(t, this)²: 0.05 is the velocity's own, 1 the clean picture's

    def validate(self) -> None:
        if not 0.0 <= self.time_uniform <= 1.0:
            raise UserError(f"family.time_uniform={self.time_uniform} is a share: give a number from 0 to 1")
        if self.time_std <= 0 or self.sample_shift <= 0 or self.loss_min_time <= 0:
            raise UserError("family.time_std, family.sample_shift and family.loss_min_time are positive numbers")

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        shapes = self._inner(shapes)
        try:
            self.network.check_image(shapes.image)
        except UserError as error:
            if self.codec is None:
                raise
            h, w, _ = shapes.image
            raise UserError(f"family.network in latents of {h} x {w}, which it sees as the picture: {error}") from None
        return {"generator": init_params(self._build(shapes), key)}

    def logical_axes(self, shapes: Shapes) -> Params:
        return {"generator": logical_axes(self._build(self._inner(shapes)))}

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        image, text = self.clean(frozen, batch, key), batch["text"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        t = self.draw_times(time_key, image.shape[0])
        clean = self._predict(params, noisy(image, t, noise_key), t, text, dropout_key)
        error = jnp.mean(jnp.square(clean - image), axis=(1, 2, 3))
        weight = 1.0 / jnp.square(jnp.maximum(t, self.loss_min_time))
        return {"generator": (jnp.mean(error * weight), {"clean_mse": jnp.mean(error)})}

    def clean(self, frozen: Params, batch: dict[str, Any], key: jax.Array) -> jax.Array:
        """What the network learns to draw, float32 [B, h, w, c]: the batch's pictures or a draw of their latents."""
        if self.codec is None:
            return batch["image"]
        kept = batch if "latent" in batch else self.precompute(frozen, batch["image"])
        return draw(kept["latent"], kept.get("deviation"), jax.random.fold_in(key, POSTERIOR))

    def precompute(self, frozen: Params, image: jax.Array) -> dict[str, jax.Array]:
        """{"latent": its posterior's mean, "deviation": that one's, if any} float32 [B, h, w, c]; see Family.precompute."""
        if self.codec is None:
            return {}
        mean, deviation = self.codec.posterior(frozen["codec"], image)
        return {"latent": mean} if deviation is None else {"latent": mean, "deviation": deviation}

    def draw_times(self, key: jax.Array, count: int) -> jax.Array:
        """float32 [count] in (0, 1): logit-normal, a share of them uniform."""
        normal_key, uniform_key, choice_key = jax.random.split(key, 3)
        normal = jax.nn.sigmoid(self.time_mean + self.time_std * jax.random.normal(normal_key, (count,)))
        uniform = jax.random.uniform(uniform_key, (count,))
        return jnp.where(jax.random.uniform(choice_key, (count,)) < self.time_uniform, uniform, normal)

    def sample(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
    ) -> jax.Array:
        """uint8 [B, H, W, C]; see Family.sample."""
        step = self._stepper(params, text, null_text, settings)
        return self._picture(frozen, walk(step, settings.num_steps, noise(key, self._latent(settings.image))))

    def trace(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
        frames: int,
    ) -> jax.Array:
        """uint8 [frames, B, H, W, C]: what the network takes the clean picture for, ever later; see Family.trace."""
        step = self._stepper(params, text, null_text, settings)
        begin = noise(key, self._latent(settings.image))
        return watch(step, settings.num_steps, begin, frames, lambda x: self._picture(frozen, x))

    def _stepper(self, params: Params, text: TextFeatures, null_text: TextFeatures, settings: SampleSettings) -> Step:
        """Of num_steps steps."""
        predict = guided(functools.partial(self._predict, params), text, null_text, settings)

        def velocity(x: jax.Array, t: jax.Array, clean: jax.Array) -> jax.Array:
            return (x - clean) / jnp.maximum(t, MIN_TIME)

        def step(i: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            t, after = (self._time(j, settings) for j in (i, i + 1))
            clean = predict(x, t, t)
            v = velocity(x, t, clean)
            ahead = x + (after - t) * v
            if settings.sampler == "euler":
                return ahead, clean
            # Heun's corrector; the last step ends on the clean prediction itself and has nothing to correct.
            corrected = lambda: x + (after - t) * 0.5 * (v + velocity(ahead, after, predict(ahead, after, after)))  # noqa: E731
            return jax.lax.cond(after > 0, corrected, lambda: ahead), clean

        return step

    def _time(self, i: jax.Array, settings: SampleSettings) -> jax.Array:
        """t before the i-th of num_steps steps."""
        t = 1.0 - i / settings.num_steps
        return self.sample_shift * t / (1.0 + (self.sample_shift - 1.0) * t)

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """Of the network alone: a codec's own work is not counted."""
        return self.network.flops(self._inner(shapes), tokens)

    def resolve(self) -> Self:
        return self if self.codec is None else replace(self, codec=self.codec.resolve())

    def init_frozen(self, shapes: Shapes) -> Params:
        return {} if self.codec is None else {"codec": self.codec.init(jax.random.key(0), shapes.image)}

    def load_frozen(self) -> Params:
        return {} if self.codec is None else {"codec": self.codec.load()}

    def _latent(self, image: Image) -> Image:
        """The shape of what the network sees of pictures of this shape. Raises UserError where it does not fit."""
        if self.codec is None:
            return image
        self.codec.check_image(image)
        return self.codec.latent_shape(image)

    def _inner(self, shapes: Shapes) -> Shapes:
        return shapes._replace(image=self._latent(shapes.image))

    def _picture(self, frozen: Params, x: jax.Array) -> jax.Array:
        """uint8 [B, H, W, C] of what the network draws; only pixels are clipped."""
        return to_uint8(x if self.codec is None else self.codec.decode(frozen["codec"], x))

    def _build(self, shapes: Shapes):
        return lambda rngs: self.network.build(rngs, shapes, shapes.image[2])

    def _predict(
        self, params: Params, x: jax.Array, t: jax.Array, text: TextFeatures, key: jax.Array | None = None
    ) -> jax.Array:
        """The clean picture, float32 [B, H, W, C], computed in the parameters' dtype."""
        network: Any = bind(self._build(Shapes.of(x.shape[1:], text)), params["generator"])
        return network(x.astype(dtype_of(params["generator"])), t, text, key).astype(jnp.float32)


def noisy(x: jax.Array, t: jax.Array, key: jax.Array) -> jax.Array:
    """x_t [B, H, W, C] of pictures x at times t [B]."""
    at = t[:, None, None, None]
    return (1 - at) * x + at * jax.random.normal(key, x.shape, jnp.float32)
