"""Generators and discriminators of a GAN, in pairs.

A pair is a frozen config dataclass with `noise` (numbers a picture is drawn from), `check_image`, and

    generator(rngs, shapes)      -> module(noise [B, noise], text) -> [B, H, W, C]
    discriminator(rngs, shapes)  -> module with read(text) -> reading, look(image [B, H, W, C]) -> seen and
                                    judge(seen, reading) -> float32 logits [B]; `reading` is a tree of arrays [B, ...]
    flops(shapes, tokens)        -> Passes

A discriminator works in three parts so that one look at a picture serves all the captions it is held against, and one
reading of a caption all pictures. None of it may mix the examples of a batch: a penalty is on each picture's own gradient."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.conditioning import Conditioning, MLPEmbed, attend_map, attend_map_flops
from jaxgen.nn.attention import Attention, rotary_2d
from jaxgen.nn.layers import MLP, Conv, Linear, RMSNorm, modulate, patchify, unpatchify
from jaxgen.nn.module import param
from jaxgen.text.features import TextFeatures

SEED = 16  # channels of the map that the noise becomes
NARROW = 16  # channels in which the discriminator remembers where it saw what
SLOPE = 0.2  # of the leaky rectifiers

Axes = tuple[str | None, str | None]
MIX: Axes = ("in_channels", "channels")


class Passes(NamedTuple):
    """Floating point operations of one forward pass for one image (or one caption: `read`) of each part."""

    draw: float
    read: float
    look: float
    judge: float


@register("residual_gan")
@dataclass(frozen=True)
class Residual:
    """A residual convolutional generator, and a discriminator that looks by convolutions and judges by a transformer.

    Generator: pooled text and noise become a style that modulates every block (StyleGAN's mapping, arXiv 1812.04948), the
    noise also a small map at the coarsest level; blocks attend to the text tokens. Discriminator: residual convolutions
    without norms (R3GAN, arXiv 2501.05441), then transformer blocks over [text tokens; picture] together, then a projection
    on the pooled text (arXiv 1802.05637). What is bound to what is decided among tokens: pooled text does not say it."""

    noise: int = 64
    patch: int = 2  # pixels drawn and seen at once, along each axis
    # The generator's levels, the finest first, each at half the resolution of the one before.
    widths: tuple[int, ...] = (64, 128)
    blocks: tuple[int, ...] = (3, 2)
    attention: tuple[Literal["none", "text", "joint"], ...] = ("text", "joint")
    # The discriminator's. The last one's positions are what its transformer sees.
    seen_widths: tuple[int, ...] = (48, 96)
    seen_blocks: tuple[int, ...] = (1, 1)
    judge_width: int = 128
    judge_blocks: int = 2
    head_dim: int = 32
    refiner: int = 2  # transformer blocks over the text tokens alone, in both

    def validate(self) -> None:
        if not len(self.widths) == len(self.blocks) == len(self.attention):
            raise UserError(
                "family.network: widths, blocks and attention need one entry a level each, "
                f"got {len(self.widths)}, {len(self.blocks)} and {len(self.attention)}"
            )
        if len(self.seen_widths) != len(self.seen_blocks):
            raise UserError(
                "family.network: seen_widths and seen_blocks need one entry a level each, "
                f"got {len(self.seen_widths)} and {len(self.seen_blocks)}"
            )
        if self.noise < 1:
            raise UserError(f"family.network.noise={self.noise} must be at least 1")
        attending = [w for w, kind in zip(self.widths, self.attention, strict=True) if kind != "none"]
        for width in (*attending, self.judge_width):
            if width % self.head_dim or self.head_dim % 4:
                raise UserError(f"family.network: width {width} must be a multiple of head_dim={self.head_dim}, that of 4")

    def check_image(self, image: tuple[int, int, int]) -> None:
        factor = self.patch * 2 ** (max(len(self.widths), len(self.seen_widths)) - 1)
        if image[0] % factor or image[1] % factor:
            raise UserError(
                f"data.image_size={image[0]} is no multiple of {factor}, which patch={self.patch} and "
                f"{max(len(self.widths), len(self.seen_widths))} levels of family.network ask for"
            )

    def generator(self, rngs: nnx.Rngs, shapes: Shapes) -> nnx.Module:
        return _Generator(self, shapes, rngs)

    def discriminator(self, rngs: nnx.Rngs, shapes: Shapes) -> nnx.Module:
        return _Discriminator(self, shapes, rngs)

    def flops(self, shapes: Shapes, tokens: int) -> Passes:
        """Norms and activations are not counted."""
        area = math.prod(shapes.image[:2]) // self.patch**2
        pixel, text = shapes.image[2] * self.patch**2, self.widths[-1]
        coarsest = area // 4 ** (len(self.widths) - 1)
        draw = self._read_flops(shapes, text, tokens) + 2 * text * (self.noise + 2 * text)
        draw += 2 * SEED * coarsest * (self.noise + 9 * text) + 2 * 9 * self.widths[0] * pixel * area
        cells = [area // 4**i for i in range(max(len(self.widths), len(self.seen_widths)))]
        for count, width, blocks, attends in zip(cells, self.widths, self.blocks, self.attention, strict=False):
            block = 2 * 2 * 9 * width**2 * count + 2 * text * 4 * width
            if attends != "none":
                block += attend_map_flops(count, width, text, tokens, attends == "joint")
            draw += blocks * block
        draw += sum(2 * 4 * a * b * n for a, b, n in zip(self.widths, self.widths[1:], cells[1:], strict=False))
        look = 2 * 9 * pixel * self.seen_widths[0] * area
        look += sum(4 * 9 * w**2 * n * k for w, n, k in zip(self.seen_widths, cells, self.seen_blocks, strict=False))
        look += sum(2 * 4 * a * b * n for a, b, n in zip(self.seen_widths, self.seen_widths[1:], cells[1:], strict=False))
        places, w = cells[len(self.seen_widths) - 1], self.judge_width
        look += 2 * self.seen_widths[-1] * w * places
        judge = self.judge_blocks * _block_flops(places + tokens, w) + 2 * places * w * NARROW * 2 + 2 * w * w
        return Passes(float(draw), float(self._read_flops(shapes, w, tokens) + 2 * w * w), float(look), float(judge))

    def _read_flops(self, shapes: Shapes, width: int, tokens: int) -> int:
        return 2 * width * (tokens * shapes.hidden + shapes.pooled + width) + self.refiner * _block_flops(tokens, width)


def _block_flops(tokens: int, width: int) -> int:
    """Of a transformer block whose hidden layer is twice as wide."""
    return 2 * tokens * width * (8 * width + 2 * tokens)


class _Generator(nnx.Module):
    def __init__(self, c: Residual, shapes: Shapes, rngs: nnx.Rngs):
        self.config, text = c, c.widths[-1]
        factor = c.patch * 2 ** (len(c.widths) - 1)
        self.places = (shapes.image[0] // factor, shapes.image[1] // factor)
        self.conditioning = Conditioning(shapes.hidden, shapes.pooled, text, rngs, refiner=c.refiner, time=False)
        self.noise = Linear(c.noise, text, rngs, axes=(None, "embed"))
        self.mapping = MLPEmbed(text, text, rngs)
        self.seed = Linear(c.noise, math.prod(self.places) * SEED, rngs, axes=(None, "embed"))
        self.stem = Conv(SEED, text, rngs)
        self.levels = nnx.List(
            [
                nnx.List([_Styled(width, text, attends, c.head_dim, rngs) for _ in range(blocks)])
                for width, blocks, attends in zip(c.widths, c.blocks, c.attention, strict=True)
            ]
        )
        self.grow = nnx.List([Linear(b, 4 * a, rngs, axes=MIX) for a, b in zip(c.widths, c.widths[1:], strict=False)])
        self.norm = RMSNorm(c.widths[0], rngs)
        self.head = Conv(c.widths[0], shapes.image[2] * c.patch**2, rngs)

    def __call__(self, noise: jax.Array, text: TextFeatures) -> jax.Array:
        vector, tokens = self.conditioning(None, text, noise.dtype)
        style = jax.nn.silu(self.mapping(vector + self.noise(noise)))
        x = self.stem(self.seed(noise).reshape(-1, *self.places, SEED))
        for i in reversed(range(len(self.levels))):
            for block in self.levels[i]:
                x = block(x, style, tokens, text.mask)
            if i:
                x = unpatchify(self.grow[i - 1](x), 2)
        return unpatchify(self.head(jax.nn.silu(self.norm(x))), self.config.patch)


class _Styled(nnx.Module):
    """Two convolutions behind norms that the style modulates, then attention to image and text, each added to its input."""

    def __init__(self, width: int, text: int, attends: str, head_dim: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(width, rngs), RMSNorm(width, rngs)
        self.conv1, self.conv2 = Conv(width, width, rngs), Conv(width, width, rngs, zero=True)
        self.modulation = Linear(text, 4 * width, rngs, axes=("embed", None), zero=True)
        self.attends = attends
        if attends != "none":
            self.attention_norm = RMSNorm(width, rngs)
            self.attention = Attention(width, head_dim, rngs, context_dim=text, own_keys=attends == "joint")

    def __call__(self, x: jax.Array, style: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        scale1, shift1, scale2, shift2 = jnp.split(self.modulation(style), 4, axis=-1)
        h = self.conv1(jax.nn.silu(modulate(self.norm1(x), scale1, shift1)))
        x = x + self.conv2(jax.nn.silu(modulate(self.norm2(h), scale2, shift2)))
        if self.attends == "none":
            return x
        return x + attend_map(self.attention, self.attention_norm(x), tokens, mask)


class _Discriminator(nnx.Module):
    def __init__(self, c: Residual, shapes: Shapes, rngs: nnx.Rngs):
        self.config, w = c, c.judge_width
        factor = c.patch * 2 ** (len(c.seen_widths) - 1)
        self.places = (shapes.image[0] // factor, shapes.image[1] // factor)
        self.conditioning = Conditioning(shapes.hidden, shapes.pooled, w, rngs, refiner=c.refiner, time=False)
        self.project = Linear(w, w, rngs, axes=("embed", None))
        self.stem = Conv(shapes.image[2] * c.patch**2, c.seen_widths[0], rngs)
        self.levels = nnx.List(
            [
                nnx.List([_Plain(width, rngs) for _ in range(blocks)])
                for width, blocks in zip(c.seen_widths, c.seen_blocks, strict=True)
            ]
        )
        pairs = zip(c.seen_widths, c.seen_widths[1:], strict=False)
        self.shrink = nnx.List([Linear(4 * a, b, rngs, axes=MIX) for a, b in pairs])
        self.enter = Linear(c.seen_widths[-1], w, rngs, axes=("in_channels", "channels"))
        # As large as a text token: the norms that follow would blow up what an even background leaves near zero.
        self.positions = param(nnx.initializers.normal(1.0), rngs, (math.prod(self.places), w), (None, "embed"))
        self.blocks = nnx.List([_Joint(w, c.head_dim, rngs) for _ in range(c.judge_blocks)])
        self.norm = RMSNorm(w, rngs)
        self.narrow = Linear(w, NARROW, rngs, axes=("embed", None))
        self.where = Linear(math.prod(self.places) * NARROW, w, rngs, axes=(None, "embed"))
        self.said = Linear(w, w, rngs, axes=("embed", None))
        # No bias: where logits are compared in pairs none is learned, and an optimizer would make noise of it.
        self.head = Linear(w, 1, rngs, axes=("embed", None), bias=False)

    def read(self, text: TextFeatures) -> tuple[jax.Array, jax.Array, jax.Array]:
        vector, tokens = self.conditioning(None, text, self.head.kernel[...].dtype)
        return self.project(vector), tokens, text.mask

    def look(self, image: jax.Array) -> jax.Array:
        x = self.stem(patchify(image.astype(self.head.kernel[...].dtype), self.config.patch))
        for i, blocks in enumerate(self.levels):
            if i:
                x = self.shrink[i - 1](patchify(x, 2))
            for block in blocks:
                x = block(x)
        return self.enter(x).reshape(len(x), -1, self.config.judge_width)

    def judge(self, seen: jax.Array, reading: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        vector, tokens, mask = reading
        count, places = tokens.shape[1], seen.shape[1]
        stream = jnp.concatenate([tokens, seen + self.positions[...].astype(seen.dtype)], axis=1)
        keys = jnp.concatenate([mask, jnp.ones((len(seen), places), bool)], axis=1)
        rotary = rotary_2d(*self.places, self.config.head_dim, still=count)
        for block in self.blocks:
            stream = block(stream, keys, rotary)
        stream = self.norm(stream)
        real = mask[..., None].astype(stream.dtype)
        said = self.said(jnp.sum(stream[:, :count] * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1))
        features = _leaky(said + self.where(self.narrow(stream[:, count:]).reshape(len(seen), -1)))
        projected = jnp.sum(features * vector, axis=-1) / math.sqrt(self.config.judge_width)
        return (self.head(features)[:, 0] + projected).astype(jnp.float32)


class _Plain(nnx.Module):
    """Two convolutions added to their input; no norm."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv1, self.conv2 = Conv(width, width, rngs), Conv(width, width, rngs, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.conv2(_leaky(self.conv1(_leaky(x))))


class _Joint(nnx.Module):
    """A pre-norm transformer block over text tokens and picture together."""

    def __init__(self, width: int, head_dim: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(width, rngs), RMSNorm(width, rngs)
        self.attention = Attention(width, head_dim, rngs)
        self.mlp = MLP(width, 2 * width, rngs, zero=True)

    def __call__(self, x: jax.Array, mask: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        x = x + self.attention(self.norm1(x), mask=mask, rotary=rotary)
        return x + self.mlp(self.norm2(x))


@register("dcgan")
@dataclass(frozen=True)
class DCGAN:
    """The textbook pair: Radford et al., arXiv 1511.06434, conditioned as Reed et al., arXiv 1605.05396: pooled text is
    joined to the noise, and to each place of the discriminator's last map.

    From 4 x 4 places up, each level twice as large and half as wide. A strided convolution (either way) is written as a
    3 x 3 one over blocks of 2 x 2 pixels. Batch norm is replaced by a norm of each position's channels (arXiv 1710.10196),
    which needs no running averages and keeps the pictures of a batch apart."""

    noise: int = 100
    width: int = 32  # of the finest level
    text: int = 64  # numbers that the pooled text is cut down to

    def validate(self) -> None:
        if min(self.noise, self.width, self.text) < 1:
            raise UserError("family.network: noise, width and text must be at least 1")

    def check_image(self, image: tuple[int, int, int]) -> None:
        if image[0] != image[1] or image[0] < 8 or image[0] & (image[0] - 1):
            raise UserError(f"data.image_size={image[0]}: family.network=dcgan draws squares of 8, 16, 32, 64 … pixels")

    def widths(self, shapes: Shapes) -> list[int]:
        """Of the maps from 4 x 4 up to half the picture's size."""
        levels = (shapes.image[0] // 4).bit_length() - 1
        return [self.width * 2**i for i in reversed(range(levels))]

    def generator(self, rngs: nnx.Rngs, shapes: Shapes) -> nnx.Module:
        return _DCGANGenerator(self, shapes, rngs)

    def discriminator(self, rngs: nnx.Rngs, shapes: Shapes) -> nnx.Module:
        return _DCGANDiscriminator(self, shapes, rngs)

    def flops(self, shapes: Shapes, tokens: int) -> Passes:
        """Norms and activations are not counted."""
        widths = self.widths(shapes)
        cut = 2 * shapes.pooled * self.text
        between = sum(2 * 9 * 16 * 4**i * 4 * a * b for i, (a, b) in enumerate(itertools.pairwise(widths)))
        last = 2 * 9 * math.prod(shapes.image[:2]) // 4 * 4 * shapes.image[2] * widths[-1]
        draw = cut + 2 * (self.noise + self.text) * 16 * widths[0] + between + last
        judge = 2 * 16 * (widths[0] + self.text) * widths[0] + 2 * 16 * widths[0]
        return Passes(float(draw), float(cut), float(between + last), float(judge))


class _DCGANGenerator(nnx.Module):
    def __init__(self, c: DCGAN, shapes: Shapes, rngs: nnx.Rngs):
        widths = c.widths(shapes)
        self.text = Linear(shapes.pooled, c.text, rngs, axes=(None, "embed"))
        self.stem = Linear(c.noise + c.text, 16 * widths[0], rngs, axes=("embed", None))
        self.norms = nnx.List([RMSNorm(w, rngs) for w in widths])
        self.grow = nnx.List([Conv(a, 4 * b, rngs) for a, b in itertools.pairwise(widths)])
        self.head = Conv(widths[-1], 4 * shapes.image[2], rngs)

    def __call__(self, noise: jax.Array, text: TextFeatures) -> jax.Array:
        told = _leaky(self.text(text.pooled.astype(noise.dtype)))
        x = self.stem(jnp.concatenate([noise, told], axis=-1))
        x = x.reshape(len(x), 4, 4, -1)
        for norm, layer in zip(self.norms, [*self.grow, self.head], strict=True):
            x = unpatchify(layer(jax.nn.relu(norm(x))), 2)
        return jnp.tanh(x)


class _DCGANDiscriminator(nnx.Module):
    def __init__(self, c: DCGAN, shapes: Shapes, rngs: nnx.Rngs):
        widths = c.widths(shapes)[::-1]
        self.text = Linear(shapes.pooled, c.text, rngs, axes=(None, "embed"))
        self.stem = Conv(4 * shapes.image[2], widths[0], rngs)
        self.shrink = nnx.List([Conv(4 * a, b, rngs) for a, b in itertools.pairwise(widths)])
        self.norms = nnx.List([RMSNorm(w, rngs) for w in widths[1:]])  # none on the first, as the paper has it
        self.join = Linear(widths[-1] + c.text, widths[-1], rngs, axes=MIX)
        self.head = Linear(16 * widths[-1], 1, rngs, axes=("embed", None), bias=False)

    def read(self, text: TextFeatures) -> jax.Array:
        return _leaky(self.text(text.pooled.astype(self.head.kernel[...].dtype)))

    def look(self, image: jax.Array) -> jax.Array:
        x = _leaky(self.stem(patchify(image.astype(self.head.kernel[...].dtype), 2)))
        for norm, layer in zip(self.norms, self.shrink, strict=True):
            x = _leaky(norm(layer(patchify(x, 2))))
        return x

    def judge(self, seen: jax.Array, reading: jax.Array) -> jax.Array:
        told = jnp.broadcast_to(reading[:, None, None], (*seen.shape[:3], reading.shape[-1]))
        x = _leaky(self.join(jnp.concatenate([seen, told], axis=-1)))
        return self.head(x.reshape(len(x), -1))[:, 0].astype(jnp.float32)


def _leaky(x: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(x, SLOPE)
