"""A ladder of latents: features of the picture on the way down, priors and posteriors on the way up.

The way up starts from a learned constant at the coarsest level. After some of its blocks stands a group of latents, whose
prior and posterior see all groups above it, so that what is decided first (where things stand) is known to what follows
(Sønderby et al., arXiv 1602.02282; NVAE, arXiv 2007.03898; VDVAE, arXiv 2011.10650)."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.conditioning import Conditioning, attend_map, attend_map_flops
from jaxgen.nn.attention import Attention
from jaxgen.nn.layers import Conv, Linear, RMSNorm, modulate, patchify, unpatchify
from jaxgen.nn.module import param
from jaxgen.text.features import TextFeatures

BOUND = 5.0  # of a log scale: what leads outside could not come back


class Gaussian(NamedTuple):
    """A diagonal Gaussian over latents: float32 [B, h, w, channels] each."""

    mean: jax.Array
    log_scale: jax.Array


Words = tuple[jax.Array, jax.Array, jax.Array]  # the text's vector [B, D], its tokens [B, T, D] and their mask [B, T]
# draw(k, prior, posterior) -> latents [B, h, w, channels] of group k, coarsest first; posterior is None without a picture.
Draw = Callable[[int, Gaussian, Gaussian | None], jax.Array]


@register("ladder")
@dataclass(frozen=True)
class Ladder:
    """Levels from the finest to the coarsest. `strides`: pixels to a cell of the first level, then cells of a level to one
    of the next, along each axis; a level of 1 x 1 cells holds what concerns the whole picture."""

    strides: tuple[int, ...] = (2, 2, 2, 4)
    widths: tuple[int, ...] = (64, 96, 96, 128)
    down: tuple[int, ...] = (1, 1, 1, 1)  # residual blocks of each level on the way down
    up: tuple[int, ...] = (2, 2, 1, 2)  # and on the way up
    groups: tuple[int, ...] = (0, 1, 1, 2)  # of latents: one after each of a level's first blocks on the way up
    channels: int = 16  # of a latent
    # After each of a level's blocks on the way up: to the text, or to picture and text jointly.
    attention: tuple[Literal["none", "text", "joint"], ...] = ("none", "joint", "joint", "text")
    head_dim: int = 32
    refiner: int = 1  # transformer blocks over the text tokens

    def validate(self) -> None:
        fields = ("strides", "widths", "down", "up", "groups", "attention")
        counts = [len(getattr(self, name)) for name in fields]
        if len(set(counts)) > 1:
            raise UserError(f"family.network: {', '.join(fields)} need one entry a level each, got {counts}")
        if not any(self.groups) or any(some > blocks for some, blocks in zip(self.groups, self.up, strict=True)):
            raise UserError(
                f"family.network.groups={self.groups}: one at least, and on no level more than it has blocks, up={self.up}"
            )
        if self.channels < 1:
            raise UserError(f"family.network.channels={self.channels} must be at least 1")
        for width, attends in zip(self.widths, self.attention, strict=True):
            if attends != "none" and (width % self.head_dim or self.head_dim % 4):
                raise UserError(f"family.network: width {width} must be a multiple of head_dim={self.head_dim}, that of 4")

    def check_image(self, image: tuple[int, int, int]) -> None:
        factor = math.prod(self.strides)
        if image[0] % factor or image[1] % factor:
            raise UserError(
                f"data.image_size={image[0]} is no multiple of {factor}, the product of family.network.strides={self.strides}"
            )

    @property
    def top_groups(self) -> int:
        """How many groups the coarsest level that has any holds."""
        return next(count for count in reversed(self.groups) if count)

    def build(self, rngs: nnx.Rngs, shapes: Shapes, out_channels: int, learned_prior: bool) -> nnx.Module:
        return _Ladder(self, shapes, out_channels, learned_prior, rngs)

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """Of one drawing of one image from the prior; norms and activations are not counted."""
        text = self.widths[-1]
        total = 2 * tokens * text * (shapes.hidden + self.refiner * (8 * text + 2 * tokens))
        for (height, width), w, up, groups, attends in zip(
            self._cells(shapes.image), self.widths, self.up, self.groups, self.attention, strict=True
        ):
            area = height * width
            block = 2 * 2 * _kernel(area) ** 2 * w**2 * area + 2 * text * 2 * w
            if attends != "none":
                block += attend_map_flops(area, w, text, tokens, attends == "joint")
            total += up * block + groups * 2 * 3 * w * self.channels * area
        return float(total + self._between(shapes))

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """Of one forward pass of one image through posterior and likelihood."""
        total = self.flops(shapes, tokens) + self._between(shapes)
        for (height, width), w, down, groups in zip(
            self._cells(shapes.image), self.widths, self.down, self.groups, strict=True
        ):
            area = height * width
            total += down * 2 * 2 * _kernel(area) ** 2 * w**2 * area + groups * 2 * area * w * (2 * w + 2 * self.channels)
        return float(total)

    def _between(self, shapes: Shapes) -> int:
        """Of the steps between levels in one direction, and of the first or the last convolution."""
        cells = self._cells(shapes.image)
        steps = zip(self.strides[1:], self.widths, self.widths[1:], cells[1:], strict=False)
        first = 2 * 9 * self.strides[0] ** 2 * shapes.image[2] * self.widths[0] * math.prod(cells[0])
        return first + sum(2 * stride**2 * fine * coarse * math.prod(area) for stride, fine, coarse, area in steps)

    def _cells(self, image: tuple[int, int, int]) -> list[tuple[int, int]]:
        return [(image[0] // f, image[1] // f) for f in itertools.accumulate(self.strides, lambda a, b: a * b)]


def _kernel(area: int) -> int:
    return 1 if area == 1 else 3  # of the convolutions: a single cell has no neighbours


class _Ladder(nnx.Module):
    def __init__(self, c: Ladder, shapes: Shapes, out_channels: int, learned_prior: bool, rngs: nnx.Rngs):
        self.config, text, pixel = c, c.widths[-1], c.strides[0] ** 2
        cells, levels = c._cells(shapes.image), range(len(c.widths))
        sizes = [_kernel(math.prod(some)) for some in cells]
        self.conditioning = Conditioning(shapes.hidden, shapes.pooled, text, rngs, refiner=c.refiner, time=False)
        self.start = param(nnx.initializers.normal(1.0), rngs, (*cells[-1], text), (None, None, None))

        def up(i: int) -> nnx.List:
            one = lambda: _Block(c.widths[i], rngs, size=sizes[i], text=text, attends=c.attention[i], head_dim=c.head_dim)  # noqa: E731
            return nnx.List([one() for _ in range(c.up[i])])

        def latents(i: int) -> nnx.List:
            return nnx.List([_Latents(c.widths[i], c.channels, learned_prior, rngs) for _ in range(c.groups[i])])

        self.stem = Conv(shapes.image[2] * pixel, c.widths[0], rngs)
        self.down = nnx.List([nnx.List([_Block(c.widths[i], rngs, size=sizes[i]) for _ in range(c.down[i])]) for i in levels])
        self.up = nnx.List([up(i) for i in levels])
        self.latents = nnx.List([latents(i) for i in levels])
        axes = ("in_channels", "channels")
        steps = list(zip(c.widths, c.widths[1:], [s**2 for s in c.strides[1:]], strict=False))
        self.shrink = nnx.List([Linear(n * fine, coarse, rngs, axes=axes) for fine, coarse, n in steps])
        self.grow = nnx.List([Linear(coarse, n * fine, rngs, axes=axes) for fine, coarse, n in steps])
        self.norm = RMSNorm(c.widths[0], rngs)
        self.head = Conv(c.widths[0], out_channels * pixel, rngs, zero=True)

    def __call__(self, text: TextFeatures, draw: Draw, image: jax.Array | None = None) -> jax.Array:
        """[B, H, W, out_channels] from what `draw` chooses group by group; image [B, H, W, C] gives it posteriors."""
        c, dtype = self.config, self.head.kernel.dtype
        words = *self.conditioning(None, text, dtype), text.mask
        features = [None] * len(c.widths) if image is None else self._features(image.astype(dtype))
        x = jnp.broadcast_to(self.start[...], (text.mask.shape[0], *self.start.shape))
        k = 0
        for i in reversed(range(len(c.widths))):
            if i + 1 < len(c.widths):
                x = unpatchify(self.grow[i](x), c.strides[i + 1])
            for block, latents in itertools.zip_longest(self.up[i], self.latents[i]):
                x = block(x, words)
                if latents is not None:
                    x = latents(x, features[i], lambda prior, posterior, k=k: draw(k, prior, posterior))
                    k += 1
        return unpatchify(self.head(jax.nn.silu(self.norm(x))), c.strides[0])

    def _features(self, x: jax.Array) -> list[jax.Array]:
        """What the posteriors see of the picture, a map a level."""
        x, features = self.stem(patchify(x, self.config.strides[0])), []
        for i, blocks in enumerate(self.down):
            if i:
                x = self.shrink[i - 1](patchify(x, self.config.strides[i]))
            for block in blocks:
                x = block(x)
            features.append(x)
        return features


class _Latents(nnx.Module):
    """One group: what is drawn of it is added to the map."""

    def __init__(self, width: int, channels: int, learned_prior: bool, rngs: nnx.Rngs):
        self.norm = RMSNorm(width, rngs)
        self.prior = Linear(width, 2 * channels, rngs, axes=("embed", None), zero=True) if learned_prior else None
        self.features_norm = RMSNorm(width, rngs)
        self.posterior1 = Linear(2 * width, width, rngs, axes=("embed", "mlp"))
        # Zero: the posterior starts as the prior.
        self.posterior2 = Linear(width, 2 * channels, rngs, axes=("mlp", None), zero=True)
        self.project = Linear(channels, width, rngs, axes=("in_channels", "channels"))

    def __call__(self, x: jax.Array, features: jax.Array | None, draw: Callable) -> jax.Array:
        seen = self.norm(x)
        prior = Gaussian(*2 * [jnp.zeros((*x.shape[:-1], self.project.kernel.shape[0]))])
        if self.prior is not None:
            prior = _gaussian(self.prior(seen))
        posterior = None
        if features is not None:
            both = jnp.concatenate([seen, self.features_norm(features)], axis=-1)
            # How it departs from the prior, so that it follows where the prior moves (arXiv 2007.03898, section 3.2).
            change = _gaussian(self.posterior2(jax.nn.silu(self.posterior1(both))))
            posterior = Gaussian(prior.mean + change.mean, prior.log_scale + change.log_scale)
        return x + self.project(draw(prior, posterior).astype(x.dtype))


def _gaussian(x: jax.Array) -> Gaussian:
    mean, log_scale = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return Gaussian(mean, BOUND * jnp.tanh(log_scale / BOUND))


class _Block(nnx.Module):
    """Two convolutions, modulated by the text's vector where `text` is its width, then attention, each added to its input."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, size: int, text: int = 0, attends: str = "none", head_dim: int = 0):
        self.norm1, self.norm2 = RMSNorm(width, rngs), RMSNorm(width, rngs)
        self.conv1, self.conv2 = Conv(width, width, rngs, size=size), Conv(width, width, rngs, size=size, zero=True)
        self.modulation = Linear(text, 2 * width, rngs, axes=("embed", None), zero=True) if text else None
        self.attends = attends
        if attends != "none":
            self.attention_norm = RMSNorm(width, rngs)
            self.attention = Attention(width, head_dim, rngs, context_dim=text, own_keys=attends == "joint")

    def __call__(self, x: jax.Array, words: Words | None = None) -> jax.Array:
        h = self.norm2(self.conv1(jax.nn.silu(self.norm1(x))))
        if words is None or self.modulation is None:
            return x + self.conv2(jax.nn.silu(h))
        vector, tokens, mask = words
        h = modulate(h, *jnp.split(self.modulation(vector), 2, axis=-1))
        x = x + self.conv2(jax.nn.silu(h))
        if self.attends == "none":
            return x
        return x + attend_map(self.attention, self.attention_norm(x), tokens, mask)
