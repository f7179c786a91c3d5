import dataclasses

import cv2
import numpy as np
import pytest

from jaxgen.data import scenes as s
from jaxgen.evaluate.verifier import verify

SCENES = [s.example("test", index)[0] for index in range(400)]
IMAGES = np.stack([s.render(scene) for scene in SCENES])


def jpeg(image):
    options = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    return cv2.imdecode(cv2.imencode(".jpg", image, options)[1], cv2.IMREAD_COLOR)


def test_rendered_scenes_are_right_in_everything():
    verdict = verify(IMAGES, SCENES)
    for field in dataclasses.fields(verdict):
        assert getattr(verdict, field.name).all(), field.name


def test_noise_and_jpeg_do_not_matter():
    noise = np.random.default_rng(0).integers(-8, 9, IMAGES.shape)
    assert verify(np.clip(IMAGES + noise, 0, 255).astype(np.uint8), SCENES).exact.all()
    assert verify(np.stack([jpeg(image) for image in IMAGES]), SCENES).exact.all()


@pytest.mark.parametrize("attribute", ["size", "colour", "shape", "count", "relation"])
def test_a_changed_attribute_is_refused_and_named(attribute):
    rng = np.random.default_rng(1)
    values = {"size": tuple(s.SIZES), "colour": tuple(s.COLOURS), "shape": s.SHAPES, "relation": tuple(s.RELATIONS)}
    images, asked = [], []
    for image, scene in zip(IMAGES, SCENES, strict=True):
        if attribute == "relation":
            if scene.relation is None:
                continue
            other = [r for r in s.RELATIONS if r != scene.relation]
            changed = dataclasses.replace(scene, relation=other[rng.integers(3)])
        elif attribute == "count":
            if scene.kind == "relation":
                continue
            changed = dataclasses.replace(scene, objects=(*scene.objects, scene.objects[0]))
        else:
            old = getattr(scene.objects[0], attribute)
            new = rng.choice([v for v in values[attribute] if v != old])
            if scene.kind == "relation":
                objects = (dataclasses.replace(scene.objects[0], **{attribute: new}), scene.objects[1])
                if {getattr(o, attribute) for o in objects} == {getattr(o, attribute) for o in scene.objects}:
                    continue
            else:
                objects = tuple(dataclasses.replace(o, **{attribute: new}) for o in scene.objects)
            changed = dataclasses.replace(scene, objects=objects)
        images.append(image)
        asked.append(changed)
    verdict = verify(np.stack(images), asked)
    assert not verdict.exact.any()
    assert not getattr(verdict, attribute).any()


def test_swapped_attributes_are_refused():
    a, b = s.Object("large", "red", "circle", 9, 9), s.Object("small", "blue", "square", 24, 22)
    image = s.render(s.Scene("relation", (a, b), "left"))[None]
    swapped = [dataclasses.replace(a, colour="blue"), dataclasses.replace(b, colour="red")]
    verdict = verify(image, [s.Scene("relation", tuple(swapped), "left")])
    assert verdict.colour.all()
    assert not verdict.exact.any()


def test_damage_is_refused():
    rng = np.random.default_rng(2)
    blank = np.full_like(IMAGES, 128)
    extra = IMAGES.copy()
    for image in extra:
        spots = np.argwhere(np.abs(cv2.blur(image, (7, 7)).astype(int) - 128).max(-1) == 0)
        y, x = spots[rng.integers(len(spots))]
        image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = (220, 40, 40)
    halves = IMAGES.copy()
    for image, scene in zip(halves, SCENES, strict=True):
        image[:, : int(scene.objects[0].x)][np.abs(np.arange(32) - scene.objects[0].y) < 9] = 128
    for damaged in (blank, extra, halves):
        assert not verify(damaged, SCENES).exact.any()


def test_what_is_no_batch_of_pictures_is_refused():
    for images, scenes in (
        (IMAGES[:2], SCENES[:3]),
        (IMAGES[:2].astype(np.float32), SCENES[:2]),
        (IMAGES[0], SCENES[:32]),
    ):
        with pytest.raises(ValueError, match="want uint8"):
            verify(images, scenes)
    assert verify(IMAGES[:0], []).exact.shape == (0,)


def test_many_pictures_are_judged_in_their_order():
    images = np.concatenate([IMAGES, IMAGES[:150]])
    shown = [*SCENES, *SCENES[:150]]
    asked = [scene if i % 3 else SCENES[-1] for i, scene in enumerate(shown)]
    right = [s.caption(a) == s.caption(b) for a, b in zip(asked, shown, strict=True)]
    np.testing.assert_array_equal(verify(images, asked).exact, right)


@pytest.mark.parametrize("size", [24, 48, 64])
def test_other_sizes_are_judged_alike(size):
    scenes = [s.example("test", index, size=size)[0] for index in range(60)]
    images = np.stack([s.render(scene, size) for scene in scenes])
    assert verify(images, scenes).exact.all()
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above", None: None}
    turned = [dataclasses.replace(scene, relation=opposite[scene.relation]) for scene in scenes]
    np.testing.assert_array_equal(verify(images, turned).exact, [scene.relation is None for scene in scenes])


CORNER = s.Scene("single", (s.Object("small", "red", "circle", 8, 8),))


@pytest.mark.parametrize(
    ("height", "width", "level", "exact"),
    [
        (1, 2, 100, True),  # specks
        (2, 2, 100, False),
        (2, 3, 35, True),  # fainter ones may be larger
        (3, 4, 35, False),
        (8, 8, 20, True),  # what no eye sees
    ],
)
def test_spots_count_from_the_size_on_at_which_an_eye_sees_them(height, width, level, exact):
    image = s.render(CORNER)
    image[20 : 20 + height, 20 : 20 + width] += np.uint8(level)
    verdict = verify(image[None], [CORNER])
    assert verdict.exact[0] == exact
    assert verdict.count[0] == exact


def test_what_touches_the_border_or_spans_the_picture_is_no_object():
    bars = np.stack([s.render(CORNER)] * 4)
    bars[0, 20:23] = (50, 80, 220)
    bars[1, :, 20:23] = (50, 80, 220)
    bars[2, 26:] = (50, 80, 220)
    bars[3] = (220, 40, 40)
    verdict = verify(bars, [CORNER] * 4)
    assert not (verdict.exact | verdict.shape).any()


@pytest.mark.parametrize(("right", "down"), [(0, 0), (0, 19), (19, 0), (19, 19)])
def test_objects_may_stand_anywhere_whole(right, down):
    """Also closer to the border than training pictures have them, but not cut by it."""
    for shape in s.SHAPES:
        scene = s.Scene("single", (s.Object("large", "yellow", shape, 7.5 + right * 0.9, 7.5 + down * 0.9),))
        assert verify(s.render(scene)[None], [scene]).exact.all()
    cut = s.Scene("single", (s.Object("large", "yellow", "square", 1.0, 16.0),))
    assert not verify(s.render(cut)[None], [cut]).exact.any()


def test_faded_objects_are_refused():
    for colour in s.COLOURS:
        scene = s.Scene("single", (s.Object("large", colour, "square", 16, 16),))
        faded = 128 + 0.5 * (s.render(scene).astype(np.float32) - 128)
        assert not verify(faded.round().astype(np.uint8)[None], [scene]).exact.any()


def test_a_little_colour_error_and_blur_are_passed_over():
    scenes = [scene for scene in SCENES if all(o.size == "large" for o in scene.objects)]
    images = np.stack([s.render(scene) for scene in scenes])
    shifted = np.clip(images.astype(int) + (images != 128) * np.array([12, -12, 8]), 0, 255).astype(np.uint8)
    assert verify(shifted, scenes).exact.mean() > 0.98
    blurred = np.stack([cv2.GaussianBlur(image, (3, 3), 0.5) for image in images])
    assert verify(blurred, scenes).exact.mean() > 0.98


@pytest.mark.parametrize("relation", s.RELATIONS)
@pytest.mark.parametrize(("along", "across", "holds"), [(8.5, 4, True), (7, 6.5, False), (10, 9, True), (10, 12, False)])
def test_a_relation_needs_the_stated_distance(relation, along, across, holds):
    dx, dy = s.RELATIONS[relation]
    step = np.array([along, across] if dx else [across, along]) * (dx + dy)
    start = np.array([8, 8]) if dx + dy > 0 else np.array([24, 24])
    a, b = s.Object("small", "red", "diamond", *start), s.Object("small", "blue", "diamond", *(start + step))
    scene = s.Scene("relation", (a, b), relation)
    verdict = verify(s.render(scene)[None], [scene])
    assert verdict.relation[0] == verdict.exact[0] == holds
    assert (verdict.count & verdict.colour & verdict.shape & verdict.size).all()
