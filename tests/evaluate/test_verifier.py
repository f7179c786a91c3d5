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
