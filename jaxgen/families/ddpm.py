"""Denoising diffusion in its textbook form (Ho et al., arXiv 2006.11239): x_k = √ᾱ_k x + √(1 - ᾱ_k) noise at steps k = 1 … T,
the network predicts the noise, the loss is its squared error, each step weighing the same.

ᾱ_k is the product of 1 - β up to k: β linear (the paper's), or so that √ᾱ is a cosine (arXiv 2102.09672). A picture is
drawn over any sub-sequence of the steps, without fresh noise (DDIM with η = 0, arXiv 2010.02502) or with that of the
sub-sequence's own posterior (the paper's ancestral sampling); guidance by arXiv 2207.12598. The network is told k / T."""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Family, Losses, SampleSettings, Shapes, noise, to_uint8
from jaxgen.families.steps import Step, guided, walk, watch
from jaxgen.families.transformer import Transformer
from jaxgen.families.unet import UNet
from jaxgen.nn.module import Params, bind, dtype_of, init_params, logical_axes
from jaxgen.text.features import TextFeatures


@register("ddpm")
@dataclass(frozen=True)
class DDPM(Family):
    samplers: ClassVar = ("ddim", "ddpm")

    network: UNet | Transformer = field(default_factory=UNet)
    schedule: Literal["linear", "cosine"] = "linear"
    num_timesteps: int = 1000  # T
    clip: bool = True  # the clean picture that a step leads towards, to [-1, 1]

    def validate(self) -> None:
        if self.num_timesteps < 25:
            raise UserError(f"family.num_timesteps={self.num_timesteps} is too few for its schedules: at least 25")

    def alpha_bar(self) -> np.ndarray:
        """float64 [T + 1]: the share of the picture's variance left after k steps, from 1."""
        steps = self.num_timesteps
        if self.schedule == "linear":
            # The paper's 1e-4 … 0.02 are those of T = 1000.
            beta = np.linspace(1e-4, 0.02, steps) * 1000 / steps
        else:
            level = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
            beta = np.minimum(1.0 - level[1:] / level[:-1], 0.999)
        return np.concatenate([[1.0], np.cumprod(1.0 - beta)])

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        self.network.check_image(shapes.image)
        return {"generator": init_params(self._build(shapes), key)}

    def logical_axes(self, shapes: Shapes) -> Params:
        return {"generator": logical_axes(self._build(shapes))}

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        image = batch["image"]
        step_key, noise_key, dropout_key = jax.random.split(key, 3)
        k = jax.random.randint(step_key, image.shape[:1], 1, self.num_timesteps + 1)
        signal, sigma = self._levels(k[:, None, None, None])
        added = jax.random.normal(noise_key, image.shape, jnp.float32)
        x = signal * image + sigma * added
        error = jnp.square(self._predict(params, x, k, batch["text"], dropout_key) - added)
        return {"generator": (jnp.mean(error), {})}

    def sample(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
    ) -> jax.Array:
        """uint8 [B, H, W, C]; see Family.sample. More steps than T are T."""
        step, count = self._stepper(params, text, null_text, key, settings)
        return to_uint8(walk(step, count, noise(key, settings.image)))

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
        """uint8 [frames, B, H, W, C]: the clean pictures that the steps lead towards; see Family.trace."""
        step, count = self._stepper(params, text, null_text, key, settings)
        return watch(step, count, noise(key, settings.image), frames, to_uint8)

    def _stepper(
        self, params: Params, text: TextFeatures, null_text: TextFeatures, key: jax.Array, settings: SampleSettings
    ) -> tuple[Step, jax.Array]:
        """(step, how many of them)."""
        predict = guided(functools.partial(self._predict, params), text, null_text, settings)
        count = jnp.minimum(settings.num_steps, self.num_timesteps)

        def step(i: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            now, after = (jnp.round(self.num_timesteps * (1.0 - j / count)).astype(jnp.int32) for j in (i, i + 1))
            signal, sigma = self._levels(now)
            signal2, sigma2 = self._levels(after)
            clean = (x - sigma * predict(x, now, now / self.num_timesteps)) / signal
            if self.clip:
                clean = jnp.clip(clean, -1.0, 1.0)
            added = (x - signal * clean) / sigma
            if settings.sampler == "ddim":
                return signal2 * clean + sigma2 * added, clean
            # The posterior's mean and deviation, the former in terms of x's own noise.
            kept = sigma2**2 / sigma * signal / signal2
            fresh = sigma2 / sigma * jnp.sqrt(-jnp.expm1(self._log_alpha_bar(now) - self._log_alpha_bar(after)))
            drawn = noise(jax.vmap(lambda row: jax.random.fold_in(row, i + 1))(key), settings.image)
            return signal2 * clean + kept * added + fresh * drawn, clean

        return step, count

    def _levels(self, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(√ᾱ_k, √(1 - ᾱ_k)), float32."""
        log = self._log_alpha_bar(k)
        return jnp.exp(log / 2), jnp.sqrt(-jnp.expm1(log))

    def _log_alpha_bar(self, k: jax.Array) -> jax.Array:
        # The logarithm: near 1, where float32 would round 1 - ᾱ, its digits stay.
        return jnp.asarray(np.log(self.alpha_bar()), jnp.float32)[k]

    def flops(self, shapes: Shapes, tokens: int) -> float:
        return self.network.flops(shapes, tokens)

    def _build(self, shapes: Shapes):
        return lambda rngs: self.network.build(rngs, shapes, shapes.image[2])

    def _predict(
        self, params: Params, x: jax.Array, k: jax.Array, text: TextFeatures, key: jax.Array | None = None
    ) -> jax.Array:
        """The noise, float32 [B, H, W, C], computed in the parameters' dtype."""
        network: Any = bind(self._build(Shapes.of(x.shape[1:], text)), params["generator"])
        return network(x.astype(dtype_of(params["generator"])), k / self.num_timesteps, text, key).astype(jnp.float32)
