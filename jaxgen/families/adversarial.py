"""Adversarial training of a flow for one step: what its network takes for the clean picture in pure noise is the picture drawn.

A flow, trained, makes of noise at t = 1 the mean of all pictures that the caption allows. Here it begins with such weights
(train.init_from) and is trained on as a GAN's generator, against a discriminator that sees real pictures beside its own and
both with their captions (after Lin et al., arXiv 2501.08316, with R3GAN's loss and penalties). Nothing is left of the path:
a picture is one pass, whatever num_steps is, and the captions are followed without guidance."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.families.base import Losses, OnePass, SampleSettings, Shapes
from jaxgen.families.flow import Flow
from jaxgen.families.gan import Gan
from jaxgen.nn.module import Params, init_params, logical_axes
from jaxgen.text.features import TextFeatures


@register("adversarial")
@dataclass(frozen=True)
class Adversarial(OnePass, Flow):
    """Weights are a Flow's, and those of the discriminator of `judge`, whose own generator is not made."""

    groups: ClassVar = ("discriminator", "generator")

    judge: Gan = field(default_factory=lambda: Gan(r1=0.1, r2=0.1))

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        inner = self._inner(shapes)
        self.judge.network.check_image(inner.image)
        discriminator = init_params(self.judge.build("discriminator", inner), jax.random.fold_in(key, 1))
        return super().init(key, shapes) | {"discriminator": discriminator}

    def logical_axes(self, shapes: Shapes) -> Params:
        discriminator = logical_axes(self.judge.build("discriminator", self._inner(shapes)))
        return super().logical_axes(shapes) | {"discriminator": discriminator}

    def to_draw(self) -> Self:
        return replace(super().to_draw(), judge=Gan())

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """See Family.losses. Both groups are given the same drawn pictures, so that one step need draw them only once."""
        image, text = self.clean(frozen, batch, key), batch["text"]
        begin_key, dropout_key, *keys = jax.random.split(key, 4)
        begin = jax.random.normal(begin_key, image.shape, jnp.float32)
        drawn = self._draw(params, begin, text, dropout_key)
        return self.judge.contest(params["discriminator"], image, drawn, text, keys)

    def _noise_shape(self, image: tuple[int, int, int]) -> tuple[int, ...]:
        return self._latent(image)

    def _from(
        self, params: Params, frozen: Params, text: TextFeatures, settings: SampleSettings, begin: jax.Array
    ) -> jax.Array:
        """See OnePass._from."""
        return self._picture(frozen, self._draw(params, begin, text))

    def _draw(self, params: Params, begin: jax.Array, text: TextFeatures, key: jax.Array | None = None) -> jax.Array:
        """float32 [B, h, w, c]: the clean picture that the network sees in pure noise."""
        return self._predict(params, begin, jnp.ones(len(begin)), text, key)

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """Drawing with its backward pass, and the discriminator's work of both groups."""
        return 3.0 * self.flops(shapes, tokens) + self.judge.contest_flops(self._inner(shapes), tokens)
