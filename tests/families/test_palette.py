import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.families.base import to_uint8
from jaxgen.families.palette import Palette


@pytest.mark.parametrize("levels", [2, 5, 8])
def test_the_palette_is_a_bijection_on_its_colours(levels):
    palette = Palette(levels)
    tokens = jnp.arange(palette.vocab).reshape(1, -1, levels)
    colours = palette.detokenize({}, tokens)
    assert len(np.unique(np.asarray(colours).reshape(-1, 3), axis=0)) == levels**3
    np.testing.assert_array_equal(palette.tokenize({}, colours), tokens)
    np.testing.assert_array_equal(palette.encode({}, colours), colours)
    # The levels of a channel, and the order of the digits: red counts most.
    np.testing.assert_allclose(np.unique(colours), np.linspace(-1, 1, levels), atol=1e-6)
    np.testing.assert_allclose(colours[0, 1, 0], [-1, -1 + 2 / (levels - 1), -1], atol=1e-6)
    np.testing.assert_allclose(colours[0, -1, 0], [1, 1, -1], atol=1e-6)


def test_any_other_colour_takes_the_nearest():
    palette = Palette(4)
    image = np.random.default_rng(0).uniform(-1, 1, (2, 5, 6, 3)).astype(np.float32)
    colours = np.asarray(palette.detokenize({}, jnp.arange(64).reshape(1, 1, 64)), np.float64)[0, 0]
    nearest = np.argmin(((image[..., None, :].astype(np.float64) - colours) ** 2).sum(-1), axis=-1)
    np.testing.assert_array_equal(palette.tokenize({}, jnp.asarray(image)), nearest)
    beyond = jnp.asarray([[[[1.7, -3.0, 0.4]]]])
    np.testing.assert_allclose(palette.encode({}, beyond)[0, 0, 0], [1, -1, 1 / 3], atol=1e-6)


def test_pictures_of_bytes_come_back_as_near_as_levels_are():
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    for levels in (8, 9, 256):
        palette = Palette(levels)
        again = to_uint8(palette.detokenize({}, palette.tokenize({}, jnp.asarray(image / 127.5 - 1, jnp.float32))))
        worst = np.abs(np.asarray(again, int) - image).max()
        assert worst <= (0 if levels == 256 else 128 / (levels - 1) + 0.5)


def test_shapes_and_refusals():
    assert Palette().vocab == 512
    assert Palette().latent_shape((16, 24, 3)) == (16, 24, 3)
    assert Palette().init(None, (16, 16, 3)) == {}
    with pytest.raises(UserError, match=r"family.codec.levels=1"):
        Palette(1).validate()
    with pytest.raises(UserError, match="red, green and blue"):
        Palette().check_image((16, 16, 1))
