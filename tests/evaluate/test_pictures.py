import numpy as np
import pytest
from PIL import ImageFont

from jaxgen.evaluate import pictures
from jaxgen.evaluate.pictures import LINE, MARGIN, sheet

CHINESE = "一个小的红色圆形在一个大的蓝色正方形的左边"


@pytest.fixture(params=[True, False])
def asked(request, monkeypatch):
    """The fonts that were asked for, on a system that has the third of them or none: Pillow's own, larger, in its place."""
    asked, larger, plain = [], ImageFont.load_default(15), ImageFont.truetype

    def truetype(name, size, **more):
        if not isinstance(name, str):  # Pillow's own
            return plain(name, size, **more)
        asked.append(name)
        if name != pictures.CJK[2] or not request.param:
            raise OSError("cannot open resource")
        return larger

    monkeypatch.setattr(ImageFont, "truetype", truetype)
    pictures.cjk_font.cache_clear()
    yield asked
    pictures.cjk_font.cache_clear()


def captioned(*captions):
    return sheet([np.full((8, 8, 3), 90, np.uint8)] * len(captions), captions, cell=64)


def test_only_chinese_is_drawn_with_a_font_of_the_system(asked):
    english = captioned("a red circle")
    assert asked == []
    both = captioned("a red circle", CHINESE)
    assert asked == list(pictures.CJK)[: len(asked)]
    assert len(asked) in (3, len(pictures.CJK))
    np.testing.assert_array_equal(both[: len(english), : english.shape[1]], english)
    found = pictures.cjk_font() is not None
    assert found == (len(asked) == 3)
    assert (both[80:, 76:] < 128).any()
    count = len(asked)
    captioned(CHINESE)
    assert len(asked) == count  # looked for once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "cjk_font", lambda: None)
        assert (captioned("a red circle", CHINESE) != both).any() == found


def test_lines_of_chinese_are_as_narrow_as_their_cell(asked):
    """Signs are 11 pixels wide: five of them in 64 pixels, at most four lines."""
    assert captioned(CHINESE[:10]).shape[0] == MARGIN + 64 + 2 * LINE + MARGIN + MARGIN
    assert captioned(CHINESE).shape[0] == MARGIN + 64 + 4 * LINE + MARGIN + MARGIN
    assert captioned("a red circle").shape[0] == MARGIN + 64 + 2 * LINE + MARGIN + MARGIN
