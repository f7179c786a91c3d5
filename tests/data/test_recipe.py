import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from jaxgen.data.recipe import decode, fit, size_of


def encoded(form, orientation=None, mode="RGB", size=(24, 16)):
    """A picture, white but for its upper left quarter, that a camera marked as turned."""
    pixels = np.full((size[1], size[0]), 255, np.uint8)
    pixels[: size[1] // 2, : size[0] // 2] = 0
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, exif=exif)
    return buffer.getvalue()


# Where the dark quarter is to be seen, by what a camera says of how it was held.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
def test_a_photograph_is_the_right_way_up(orientation):
    image = decode(encoded("JPEG", orientation))
    assert image.shape == ((24, 16, 3) if orientation > 4 else (16, 24, 3))
    assert image[CORNERS[orientation]].max() < 40
    assert [image[corner].min() for corner in set(CORNERS.values()) - {CORNERS[orientation]}] == [255] * 3
    assert size_of(encoded("JPEG", orientation)) == image.shape[:2]


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")])
def test_sizes_are_those_of_the_decoded_picture(form, mode):
    data = encoded(form, mode=mode)
    assert size_of(data) == decode(data).shape[:2] == (16, 24)
    if form != "WEBP":
        assert size_of(encoded(form, mode=mode, size=(900, 700))[:2048]) == (700, 900)


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 60))
def test_what_is_no_picture_has_no_size(data, form, at):
    assert size_of(data) is None or decode(data) is not None
    broken = bytearray(encoded(form))
    broken[at : at + len(data)] = data
    size = size_of(bytes(broken[: max(at, 8)]))
    assert size is None or min(size) >= 0


@given(st.tuples(*[st.integers(1, 90)] * 2), st.tuples(*[st.integers(1, 40)] * 2))
def test_the_middle_is_kept_and_proportions_too(size, wanted):
    image = np.zeros((*size, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(size[0])[:, None] * 2, np.arange(size[1]) * 2
    found = fit(image, *wanted)
    assert found.shape == (*wanted, 3)
    rows, columns = found[:, 0, 0].astype(float), found[0, :, 1].astype(float)
    for along, side, other, ours, theirs in ((rows, 0, 1, *wanted), (columns, 1, 0, *wanted[::-1])):
        # As much is lost at both ends, and the side that is to be kept whole loses nothing.
        middle = (size[side] - 1) * 2 / 2
        assert abs((along[0] + along[-1]) / 2 - middle) <= 3
        kept = min(size[side], size[other] * ours / theirs)
        if ours > 1 and kept > 2:
            assert abs((along[-1] - along[0]) / 2 - kept * (ours - 1) / ours) <= 3
