"""Pixels as tokens: every channel is rounded to one of a few evenly spaced levels, a pixel's token is its colour's number.

Eight levels a channel are 512 colours, nine bits as in Generative pretraining from pixels (Chen et al., ICML 2020), whose
palette is made of clusters; an even grid needs no data and gives flat colours back to the same few levels everywhere. An
odd number of levels holds the mid grey."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.codec import Image, TokenCodec
from jaxgen.nn.module import Params


@register("palette")
@dataclass(frozen=True)
class Palette(TokenCodec):
    """A TokenCodec of RGB pictures, without parameters: one token a pixel, red's digit first. Latents are colours."""

    levels: int = 8  # a channel

    def validate(self) -> None:
        if not 2 <= self.levels <= 256:
            raise UserError(f"family.codec.levels={self.levels}: from 2 to 256 levels a channel")

    def check_image(self, image: Image) -> None:
        if image[2] != 3:
            raise UserError(f"family.codec: a palette is of red, green and blue, the pictures have {image[2]} channels")

    def latent_shape(self, image: Image) -> Image:
        return image

    def init(self, key: jax.Array, image: Image) -> Params:
        return {}

    def encode(self, params: Params, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.detokenize(params, self.tokenize(params, image))

    def decode(self, params: Params, latent: jax.Array) -> jax.Array:
        return latent.astype(jnp.float32)

    @property
    def vocab(self) -> int:
        return self.levels**3

    def tokenize(self, params: Params, image: jax.Array) -> jax.Array:
        """The nearest colour's; see TokenCodec.tokenize."""
        top = self.levels - 1
        digits = jnp.clip(jnp.round((image.astype(jnp.float32) + 1.0) * (top / 2)), 0, top).astype(jnp.int32)
        return (digits[..., 0] * self.levels + digits[..., 1]) * self.levels + digits[..., 2]

    def detokenize(self, params: Params, tokens: jax.Array) -> jax.Array:
        digits = jnp.stack([tokens // self.levels**2, tokens // self.levels % self.levels, tokens % self.levels], axis=-1)
        return digits.astype(jnp.float32) * (2.0 / (self.levels - 1)) - 1.0
