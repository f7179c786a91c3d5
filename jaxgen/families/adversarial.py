"""Adversarial training of a flow map for one step: its step from noise to picture, trained on as a GAN's generator.

It begins with the weights of a map that draws in one step already, or of a flow, whose step draws the mean of all pictures that
a caption allows (train.init_from). A discriminator sees real pictures beside its own and both with their captions (after Lin et
al., arXiv 2501.08316, with R3GAN's loss and penalties). One that begins knowing nothing first unlearns the generator what it
knew: best begun with as well is a trained GAN's, whose run is named behind the map's, after a comma."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import jax

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Losses, Shapes
from jaxgen.families.flow_map import WholeStep
from jaxgen.families.gan import Gan
from jaxgen.nn.module import Params, init_params, logical_axes


@register("adversarial")
@dataclass(frozen=True)
class Adversarial(WholeStep):
    """Weights are a flow map's, and those of the discriminator of `judge`, whose own generator is not made. Guidance means
    nothing here: `guidance` is what the network is told, best what it was told before."""

    groups: ClassVar = ("discriminator", "generator")

    judge: Gan = field(default_factory=lambda: Gan(r1=0.1, r2=0.1))

    def validate(self) -> None:
        super().validate()
        if self.teacher:
            raise UserError(f"family.teacher={self.teacher}: this one learns from pictures; name it in train.init_from")

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
        draw_key, *keys = jax.random.split(key, 3)
        drawn = self._drawn(params, image.shape, text, draw_key)[0]
        return self.judge.contest(params["discriminator"], image, drawn, text, keys)

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """Drawing with its backward pass, and the discriminator's work of both groups."""
        return 3.0 * self.flops(shapes, tokens) + self.judge.contest_flops(self._inner(shapes), tokens)
