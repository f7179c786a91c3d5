"""A conditional GAN: a discriminator learns to tell pictures from drawn ones and right captions from wrong ones, a generator
to draw what it takes for real; one pass of the network draws a picture.

By default the two are scored against each other in pairs, which keeps the generator from dropping what it has already
learned to draw, with penalties on the discriminator's gradient at real and at drawn pictures (R1 and R2), which make that
converge (R3GAN, arXiv 2501.05441; relativistic pairing: arXiv 1807.00734; R1: arXiv 1801.04406). A picture beside another
one's caption is to be refused as well (Reed et al., arXiv 1605.05396), or the text could be ignored."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.augment import Augmentation, augment
from jaxgen.families.base import Losses, OnePass, SampleSettings, Shapes, to_uint8
from jaxgen.families.gan_networks import DCGAN, Residual
from jaxgen.nn.module import Params, bind, dtype_of, init_params, logical_axes
from jaxgen.text.features import TextFeatures

TRIES = 8  # other rows of the batch that are looked at for a caption which says something else


@register("gan")
@dataclass(frozen=True)
class Gan(OnePass):
    """`r1` and `r2` are the papers' gamma: half of it weighs the squared norm of the discriminator's gradient at the real, and
    at the drawn pictures, as it sees them. Each step takes one in `penalty_every` of the batch's pictures for that, from a
    place in the batch drawn anew each time: exact in expectation at this share of the work, as the usual penalty on the
    whole batch in one step of many is, but without that one's rare large gradients, which clipping would cut short. Where
    the batch is no multiple of it, the largest divisor they share is taken."""

    groups: ClassVar = ("discriminator", "generator")

    network: Residual | DCGAN = field(default_factory=Residual)
    loss: Literal["relativistic", "nonsaturating", "hinge"] = "relativistic"
    r1: float = 0.2
    r2: float = 0.2
    penalty_every: int = 4
    mismatch: float = 0.5  # weight of real pictures beside wrong captions
    augment: tuple[Augmentation, ...] = ()  # for data sets of a few thousand pictures, and where captions allow it

    def validate(self) -> None:
        if min(self.r1, self.r2, self.mismatch) < 0:
            raise UserError("family.r1, family.r2 and family.mismatch are weights: none can be negative")
        if self.penalty_every < 1:
            raise UserError(f"family.penalty_every={self.penalty_every} must be at least 1")

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        self.network.check_image(shapes.image)
        keys = jax.random.split(key)
        return {group: init_params(self.build(group, shapes), k) for group, k in zip(self.groups, keys, strict=True)}

    def logical_axes(self, shapes: Shapes) -> Params:
        return {group: logical_axes(self.build(group, shapes)) for group in self.groups}

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """See Family.losses. Both groups are given the same drawn pictures, so that one step need draw them only once."""
        image, text = batch["image"], batch["text"]
        noise_key, *keys = jax.random.split(key, 3)
        latent = jax.random.normal(noise_key, (len(image), self.network.noise))
        return self.contest(params["discriminator"], image, self._generate(params, latent, text, image.shape[1:]), text, keys)

    def contest(
        self, params: Params, image: jax.Array, drawn: jax.Array, text: TextFeatures, keys: Sequence[jax.Array]
    ) -> Losses:
        """Both groups' losses, whatever has drawn: `params` are the discriminator's, `image` and `drawn` float [B, H, W, C]
        the real and the drawn pictures of the B captions, `keys` two."""
        discriminator: Any = bind(self.build("discriminator", Shapes.of(image.shape[1:], text)), params)
        # Where the text encoder learns with the generator, it is not to learn what misleads the discriminator.
        text = jax.lax.stop_gradient(text)
        return {
            "discriminator": self._discriminator_loss(discriminator, image, jax.lax.stop_gradient(drawn), text, keys[0]),
            "generator": self._generator_loss(discriminator, image, drawn, text, keys[1]),
        }

    def _discriminator_loss(
        self, discriminator: Any, image: jax.Array, drawn: jax.Array, text: TextFeatures, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        augment_key, wrong_key, penalty_key = jax.random.split(key, 3)
        count = len(image)
        reading = discriminator.read(text)
        pictures = augment(_interleave(image, drawn), augment_key, self.augment)
        seen = discriminator.look(pictures)
        seen = seen.reshape(count, 2, *seen.shape[1:])
        looks, readings = [seen[:, 0], seen[:, 1]], [reading, reading]
        wrong, exists = other_captions(text, wrong_key)
        if self.mismatch:
            looks.append(seen[:, 0])
            readings.append(jax.tree.map(lambda a: a[wrong], reading))
        scores = discriminator.judge(_interleave(*looks), jax.tree.map(_interleave, *readings)).reshape(count, -1).T
        real, fake = scores[:2]
        loss = jnp.mean(self._against(real, fake))
        metrics = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
        if self.loss != "relativistic":
            loss += jnp.mean(self._in_favour(real))
        if self.mismatch:
            loss += self.mismatch * jnp.mean(exists * self._against(real, scores[2]))
            metrics["wrong"] = jnp.mean(scores[2])
        squares = self._penalties(discriminator, pictures.reshape(count, 2, *image.shape[1:]), reading, penalty_key)
        for name, square in squares.items():
            loss += getattr(self, name) / 2 * square
        return loss, metrics | squares

    def _generator_loss(
        self, discriminator: Any, image: jax.Array, drawn: jax.Array, text: TextFeatures, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        reading, keys = discriminator.read(text), jax.random.split(key)
        fake = discriminator.judge(discriminator.look(augment(drawn, keys[0], self.augment)), reading)
        if self.loss == "relativistic":
            real = discriminator.judge(discriminator.look(augment(image, keys[1], self.augment)), reading)
            return jnp.mean(self._against(fake, real)), {}
        return jnp.mean(-fake if self.loss == "hinge" else self._in_favour(fake)), {}

    def _in_favour(self, real: jax.Array) -> jax.Array:
        """What it costs, each, that these logits [B] are not higher."""
        return jax.nn.relu(1 - real) if self.loss == "hinge" else jax.nn.softplus(-real)

    def _against(self, better: jax.Array, worse: jax.Array) -> jax.Array:
        """What it costs, each, that `worse` [B] is not lower: than `better` where logits are compared in pairs."""
        if self.loss == "relativistic":
            return jax.nn.softplus(worse - better)
        return jax.nn.relu(1 + worse) if self.loss == "hinge" else jax.nn.softplus(worse)

    def _penalties(self, discriminator: Any, pictures: jax.Array, reading: Any, key: jax.Array) -> dict[str, jax.Array]:
        """Mean squared norms of the logits' gradients at pictures [B, (real, drawn), H, W, C], of those that weigh at all."""
        names = [(i, name) for i, name in enumerate(("r1", "r2")) if getattr(self, name)]
        if not names:
            return {}
        every = math.gcd(len(pictures), self.penalty_every)
        place = jax.random.randint(key, (), 0, every)
        # By strides, so that every device of a mesh has its share.
        some = lambda a: a.reshape(-1, every, *a.shape[1:])[:, place]  # noqa: E731
        pictures = some(pictures)
        x = _interleave(*(pictures[:, i] for i, _ in names))
        readings = jax.tree.map(lambda a: jnp.repeat(some(a), len(names), axis=0), reading)
        gradient = jax.grad(lambda x: jnp.sum(discriminator.judge(discriminator.look(x), readings)))(x)
        squares = jnp.sum(jnp.square(gradient), axis=(1, 2, 3)).reshape(-1, len(names))
        return {name: jnp.mean(squares[:, k]) for k, (_, name) in enumerate(names)}

    def flops(self, shapes: Shapes, tokens: int) -> float:
        return self.network.flops(shapes, tokens).draw

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """Of one image in one step of both groups, penalties at their share. A forward pass counts once, a backward pass
        once for the inputs and once for the weights, and a penalty's (the gradient, and back through both) six."""
        return 3 * self.network.flops(shapes, tokens).draw + self.contest_flops(shapes, tokens)

    def contest_flops(self, shapes: Shapes, tokens: int) -> float:
        """The same without what is the generator's own."""
        p = self.network.flops(shapes, tokens)
        # The discriminator's step: it reads, looks at two pictures, judges them, and one more with a wrong caption.
        total = 3 * p.read + 3 * 2 * p.look + 3 * (3 if self.mismatch else 2) * p.judge
        total += 6 * ((self.r1 > 0) + (self.r2 > 0)) / self.penalty_every * (p.look + p.judge)
        # The generator's: back through the discriminator's inputs alone.
        return total + p.read + (3 if self.loss == "relativistic" else 2) * (p.look + p.judge)

    def build(self, group: str, shapes: Shapes):
        return lambda rngs: getattr(self.network, group)(rngs, shapes)

    def noise_shape(self, image: tuple[int, int, int]) -> tuple[int, ...]:
        return (self.network.noise,)

    def from_noise(
        self, params: Params, frozen: Params, text: TextFeatures, settings: SampleSettings, begin: jax.Array
    ) -> jax.Array:
        """See OnePass.from_noise."""
        return to_uint8(self._generate(params, begin, text, settings.image))

    def _generate(self, params: Params, latent: jax.Array, text: TextFeatures, image: tuple[int, ...]) -> jax.Array:
        """float32 [B, H, W, C] from latents [B, noise], computed in the parameters' dtype."""
        network: Any = bind(self.build("generator", Shapes.of(image, text)), params["generator"])
        return network(latent.astype(dtype_of(params["generator"])), text).astype(jnp.float32)


def other_captions(text: TextFeatures, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(row int32 [B], exists bool [B]): for each caption a row of the batch, drawn at random, whose caption is another one;
    it counts only where one was found."""
    words = text.hidden.astype(jnp.float32) * text.mask[..., None]
    # Relative to each token's size: language models differ in it by orders of magnitude.
    words = words * jax.lax.rsqrt(jnp.mean(jnp.square(words), axis=-1, keepdims=True) + 1e-12)
    rows = jax.random.randint(key, (TRIES, len(words)), 0, len(words))
    # Equal captions have equal features but for rounding.
    differs = jax.vmap(lambda row: jnp.any(jnp.abs(words - words[row]) > 0.01, axis=(1, 2)))(rows)
    first = jnp.argmax(differs, axis=0)
    return jnp.take_along_axis(rows, first[None], axis=0)[0], jnp.any(differs, axis=0)


def _interleave(*arrays: jax.Array) -> jax.Array:
    """Arrays [B, ...] -> [B * len(arrays), ...], example by example, so that on a mesh each stays where it is."""
    return jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
