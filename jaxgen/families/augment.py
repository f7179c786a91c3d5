"""DiffAugment: random changes that a discriminator sees on real and drawn pictures alike, and gradients pass through, so
that few pictures last longer (Zhao et al., arXiv 2006.10738)."""

from typing import Literal

import jax
import jax.numpy as jnp

Augmentation = Literal["colour", "translation", "cutout"]

SHIFT = 1 / 8  # largest translation, as a share of the picture's side
CUT = 1 / 2  # side of what is cut out


def augment(image: jax.Array, key: jax.Array, kinds: tuple[Augmentation, ...]) -> jax.Array:
    """float [N, H, W, C] in about [-1, 1], each picture changed by draws of its own; what is shifted in or cut out is 0.

    `kinds` are applied in the paper's order: colour, translation, cutout."""
    colour_key, shift_key, cut_key = jax.random.split(key, 3)
    if "colour" in kinds:
        image = _colour(image, colour_key)
    if "translation" in kinds:
        image = _translate(image, shift_key)
    if "cutout" in kinds:
        image = _cut_out(image, cut_key)
    return image


def _colour(image: jax.Array, key: jax.Array) -> jax.Array:
    """Brightness by ±0.5, saturation by 0 to 2, contrast by 0.5 to 1.5."""
    u = jax.random.uniform(key, (3, len(image), 1, 1, 1), image.dtype)
    image = image + u[0] - 0.5
    grey = jnp.mean(image, axis=3, keepdims=True)
    image = grey + (image - grey) * 2 * u[1]
    mean = jnp.mean(image, axis=(1, 2, 3), keepdims=True)
    return mean + (image - mean) * (u[2] + 0.5)


def _translate(image: jax.Array, key: jax.Array) -> jax.Array:
    """By whole pixels along both axes."""

    def shift(axis: int) -> jax.Array:
        side = image.shape[axis + 1]
        most = round(side * SHIFT)
        by = jax.random.randint(jax.random.fold_in(key, axis), (len(image), 1), -most, most + 1)
        # As a product with a shifted identity: its gradient is another, where a gather's is a slow scatter.
        return jax.nn.one_hot(jnp.arange(side) - by, side, dtype=image.dtype)

    return jnp.einsum("nyh,nxw,nhwc->nyxc", shift(0), shift(1), image, precision="highest")


def _cut_out(image: jax.Array, key: jax.Array) -> jax.Array:
    """A square around a random place; it may reach over the border."""

    def covered(axis: int) -> jax.Array:
        side = image.shape[axis + 1]
        length = round(side * CUT)
        start = jax.random.randint(jax.random.fold_in(key, axis), (len(image), 1), 0, side + 1) - length // 2
        offset = jnp.arange(side) - start
        return (offset >= 0) & (offset < length)

    return jnp.where(covered(0)[:, :, None, None] & covered(1)[:, None, :, None], 0.0, image)
