import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgen.data import scenes as s


@given(st.integers(0, 10**6), st.sampled_from(s.SPLITS))
def test_scenes_obey_their_rules(index, split):
    scene, captions = s.example(split, index)
    boxes = []
    for o in scene.objects:
        left, right, up, down = s.extent(o.shape, s.SIZES[o.size] * 32)
        boxes.append((o.x - left, o.x + right, o.y - up, o.y + down))
    for x0, x1, y0, y1 in boxes:
        assert min(x0, y0) >= 1
        assert max(x1, y1) <= 31
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            gap = max(a[0] - b[1], b[0] - a[1], a[2] - b[3], b[2] - a[3])
            assert gap >= 2 - 1e-9
    if scene.relation:
        a, b = scene.objects
        dx, dy = b.x - a.x, b.y - a.y
        along, across = {
            "left": (dx, abs(dy)),
            "right": (-dx, abs(dy)),
            "above": (dy, abs(dx)),
            "below": (-dy, abs(dx)),
        }[scene.relation]
        assert along >= 8
        assert along > across
    if scene.kind == "count":
        assert len({o.description for o in scene.objects}) == 1
        assert 2 <= len(scene.objects) <= 4
        assert len(scene.objects) == 2 or scene.objects[0].size == "small"
    pairs = {(o.colour, o.shape) for o in scene.objects}
    assert bool(pairs & set(s.UNSEEN_PAIRS)) == (split == "test_unseen_pairs")
    assert len(captions) == (2 if split == "train" else 1)


def test_the_unseen_pairs_cover_colours_and_shapes():
    assert len(s.UNSEEN_PAIRS) == 8
    assert {c for c, _ in s.UNSEEN_PAIRS} == set(s.COLOURS)
    assert {shape for _, shape in s.UNSEEN_PAIRS} == set(s.SHAPES)


def test_canonical_captions():
    ring = s.Object("large", "blue", "ring", 8, 8)
    cross = s.Object("small", "orange", "cross", 24, 8)
    assert s.caption(s.Scene("single", (cross,))) == "a small orange cross"
    scene = s.Scene("relation", (ring, cross), "left")
    assert s.caption(scene) == "a large blue ring to the left of a small orange cross"
    assert s.caption(s.Scene("count", (cross,) * 3)) == "three small orange crosses"


def test_canonical_captions_are_read_back_and_no_other_sentence():
    for split in s.SPLITS[:4]:
        for caption, scene in s.prompts(split, 100):
            found = s.parse(caption)
            assert (found.kind, found.relation) == (scene.kind, scene.relation)
            assert [o.description for o in found.objects] == [o.description for o in scene.objects]
    for other in ("", "a red circle", "small red circle", "two large red circle", "a small red circle by a large blue square"):
        assert s.parse(other) is None
    assert all(s.parse(caption) is None for caption, _ in s.prompts("test_paraphrases", 50))


def test_held_out_words_never_occur_in_training():
    held = {new for _, new in s.SYNONYMS.values()}
    for index in range(300):
        scene, (canonical, other) = s.example("train", index)
        assert canonical == s.caption(scene)
        assert not other.startswith("in this drawing")
        assert not any(f" {word} " in f" {other} " for word in held if word not in ("on the left of", "on the right of"))
        _, (said,) = s.example("test_paraphrases", index)
        assert said.startswith("in this drawing we can see")
        assert sum(f" {word} " in f" {said} " for word in held) == 1


def test_pixels_are_the_stated_ones():
    image = s.render(s.Scene("single", (s.Object("large", "red", "square", 16, 16),)))
    np.testing.assert_array_equal(image[16, 16], (220, 40, 40))
    np.testing.assert_array_equal(image[0, 0], (128, 128, 128))
    covered = (image.astype(float)[..., 1] - 128) / (40 - 128)
    assert covered.sum() == pytest.approx((2 * 0.86 * 0.21 * 32) ** 2, rel=0.05)
    ring = s.render(s.Scene("single", (s.Object("large", "white", "ring", 16, 16),)))
    np.testing.assert_array_equal(ring[16, 16], (128, 128, 128))


def test_the_sets_have_not_moved():
    """A digest of scenes, captions and pixels: a change here makes every score before it another one."""
    digest = hashlib.sha256()
    for split in ("train", "validation", "test", "test_unseen_pairs", "test_paraphrases"):
        for index in range(20):
            scene, captions = s.example(split, index)
            digest.update(repr((scene.to_json(), captions)).encode() + s.render(scene).tobytes())
    assert digest.hexdigest()[:16] == "09b555de0fd8c92f"
