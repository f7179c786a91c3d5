"""A small text-conditioned U-Net: convolutions where pixels are many, attention to image and text where they are few.

The convolutional bias pays where a budget is minutes on a CPU (Ronneberger et al., arXiv 1505.04597; Ho et al.,
arXiv 2006.11239); the residual blocks take time and text by adaptive normalisation (arXiv 2105.05233)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.conditioning import Conditioning, attend_map, attend_map_flops
from jaxgen.nn.attention import Attention
from jaxgen.nn.layers import Conv, Linear, RMSNorm, dropout, modulate, patchify, unpatchify
from jaxgen.text.features import TextFeatures


@register("unet")
@dataclass(frozen=True)
class UNet:
    """Pixels in blocks of `patch` x `patch`, then one level a width, each at half the resolution of the one before."""

    patch: int = 2
    widths: tuple[int, ...] = (64, 128)
    down: tuple[int, ...] = (2, 2)  # residual blocks of each level on the way down
    up: tuple[int, ...] = (3, 2)  # and on the way up
    # After each of a level's blocks: to the text, or to image and text jointly.
    attention: tuple[Literal["none", "text", "joint"], ...] = ("text", "joint")
    head_dim: int = 64
    refiner: int = 2  # transformer blocks over the text tokens
    dropout: float = 0.0

    def validate(self) -> None:
        if not len(self.widths) == len(self.down) == len(self.up) == len(self.attention):
            raise UserError(
                "family.network: widths, down, up and attention need one entry a level each, "
                f"got {len(self.widths)}, {len(self.down)}, {len(self.up)} and {len(self.attention)}"
            )
        for width, attends in zip(self.widths, self.attention, strict=True):
            if attends != "none" and width % self.head_dim:
                raise UserError(f"family.network: width {width} is no multiple of head_dim={self.head_dim}")

    def check_image(self, image: tuple[int, int, int]) -> None:
        factor = self.patch * 2 ** (len(self.widths) - 1)
        if image[0] % factor or image[1] % factor:
            raise UserError(
                f"data.image_size={image[0]} is no multiple of {factor}, which patch={self.patch} and "
                f"{len(self.widths)} levels of the U-Net ask for"
            )

    def build(self, rngs: nnx.Rngs, shapes: Shapes, out_channels: int) -> nnx.Module:
        return _UNet(self, shapes, out_channels, rngs)

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """Of one forward pass for one image; norms and activations are not counted."""
        area = shapes.image[0] * shapes.image[1] // self.patch**2
        pixel = shapes.image[2] * self.patch**2
        text = self.widths[-1]
        total = 2 * 9 * pixel * self.widths[0] * area * 2  # first and last convolution
        total += 2 * tokens * text * (shapes.hidden + self.refiner * (8 * text + 2 * tokens))
        below = 0
        for width, down, up, attends in zip(self.widths, self.down, self.up, self.attention, strict=True):
            blocks = down + up
            total += blocks * 2 * 2 * 9 * width**2 * area
            if attends != "none":
                total += blocks * attend_map_flops(area, width, text, tokens, attends == "joint")
            if below:
                total += 2 * 2 * 4 * below * width * area  # down and up between the levels
            below, area = width, area // 4
        return float(total)


class _UNet(nnx.Module):
    def __init__(self, c: UNet, shapes: Shapes, out_channels: int, rngs: nnx.Rngs):
        self.config = c
        text = c.widths[-1]
        self.conditioning = Conditioning(shapes.hidden, shapes.pooled, text, rngs, refiner=c.refiner)
        self.stem = Conv(shapes.image[2] * c.patch**2, c.widths[0], rngs)

        def level(i: int, blocks: int) -> nnx.List:
            return nnx.List([_Block(c, c.widths[i], text, c.attention[i], rngs) for _ in range(blocks)])

        levels = range(len(c.widths))
        self.down = nnx.List([level(i, c.down[i]) for i in levels])
        self.up = nnx.List([level(i, c.up[i]) for i in levels])
        pairs = list(zip(c.widths, c.widths[1:], strict=False))
        self.shrink = nnx.List([Linear(4 * a, b, rngs, axes=("in_channels", "channels")) for a, b in pairs])
        self.grow = nnx.List([Linear(b, 4 * a, rngs, axes=("in_channels", "channels")) for a, b in pairs])
        self.norm = RMSNorm(c.widths[0], rngs)
        self.head = Conv(c.widths[0], out_channels * c.patch**2, rngs, zero=True)

    def __call__(self, x: jax.Array, t: jax.Array, text: TextFeatures, key: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, C] at times t [B] -> [B, H, W, out_channels]; `key` turns dropout on."""
        vector, tokens = self.conditioning(t, text, x.dtype)
        keys = iter(jax.random.split(key, sum(self.config.down) + sum(self.config.up)) if key is not None else ())
        x = self.stem(patchify(x, self.config.patch))
        skips = []
        for i, blocks in enumerate(self.down):
            if i:
                x = self.shrink[i - 1](patchify(x, 2))
            for block in blocks:
                x = block(x, vector, tokens, text.mask, next(keys, None))
            skips.append(x)
        for i in reversed(range(len(self.up))):
            if i + 1 < len(self.up):
                x = skips[i] + unpatchify(self.grow[i](x), 2)
            for block in self.up[i]:
                x = block(x, vector, tokens, text.mask, next(keys, None))
        return unpatchify(self.head(jax.nn.silu(self.norm(x))), self.config.patch)


class _Block(nnx.Module):
    """Two modulated convolutions, then (on levels that attend) attention to image and text, each added to its input."""

    def __init__(self, c: UNet, width: int, text: int, attends: str, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(width, rngs), RMSNorm(width, rngs)
        self.conv1, self.conv2 = Conv(width, width, rngs), Conv(width, width, rngs, zero=True)
        self.modulation = Linear(text, 2 * width, rngs, axes=("embed", None), zero=True)
        self.dropout, self.attends = c.dropout, attends
        if attends != "none":
            self.attention_norm = RMSNorm(width, rngs)
            self.attention = Attention(width, c.head_dim, rngs, context_dim=text, own_keys=attends == "joint")

    def __call__(self, x: jax.Array, vector: jax.Array, tokens: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        scale, shift = jnp.split(self.modulation(vector), 2, axis=-1)
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = dropout(jax.nn.silu(modulate(self.norm2(h), scale, shift)), self.dropout, key)
        x = x + self.conv2(h)
        if self.attends == "none":
            return x
        return x + attend_map(self.attention, self.attention_norm(x), tokens, mask)
