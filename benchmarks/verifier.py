"""How exact and how fast the verifier is, on rendered scenes, scenes with one attribute flipped, and damaged pictures.

python benchmarks/verifier.py [--count=100000] [--damaged=10000] [--json=FILE]
"""

import argparse
import dataclasses
import json
import os
import time
from typing import Any

import cv2
import numpy as np

from jaxgen.data import scenes as s
from jaxgen.evaluate.verifier import verify


def flip(scene: s.Scene, rng: np.random.Generator) -> s.Scene:
    """The scene with one attribute of the caption changed."""
    objects = list(scene.objects)
    which = int(rng.integers(len(objects)))
    attributes = ["size", "colour", "shape", "count"] + (["relation"] * 2 if scene.kind == "relation" else [])
    attribute = attributes[rng.integers(len(attributes))]
    other = lambda values, old: [v for v in values if v != old][rng.integers(len(values) - 1)]  # noqa: E731
    if attribute == "relation":
        return dataclasses.replace(scene, relation=other(tuple(s.RELATIONS), scene.relation))
    if attribute == "count":
        objects = objects[1:] if len(objects) > 1 and rng.integers(2) else [*objects, objects[0]]
        return s.Scene("count" if scene.kind == "relation" else scene.kind, tuple(objects))
    values = {"size": tuple(s.SIZES), "colour": tuple(s.COLOURS), "shape": s.SHAPES}[attribute]
    new = other(values, getattr(objects[which], attribute))
    changed = range(len(objects)) if scene.kind == "count" else [which]
    for i in changed:
        objects[i] = dataclasses.replace(objects[i], **{attribute: new})
    if scene.kind == "relation" and objects[0].description == objects[1].description:
        return flip(scene, rng)
    return dataclasses.replace(scene, objects=tuple(objects))


def damage(image: np.ndarray, scene: s.Scene, rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """The picture made wrong in a way an eye sees at once."""
    size, image = image.shape[0], image.copy()
    o = scene.objects[rng.integers(len(scene.objects))]
    radius = s.SIZES[o.size] * size
    kind = ("blank", "blob", "half", "extra", "merged")[rng.integers(5)]
    y, x = np.mgrid[:size, :size] + 0.5
    colour = np.array(s.COLOURS[o.colour], float)
    near = (np.abs(x - o.x) <= 1.2 * radius) & (np.abs(y - o.y) <= 1.2 * radius)
    if kind == "blank":
        image[:] = s.BACKGROUND
    elif kind == "blob":  # a soft spot in the object's place
        image[near] = s.BACKGROUND
        soft = np.exp(-((x - o.x) ** 2 + (y - o.y) ** 2) / (0.6 * radius) ** 2)[..., None]
        image = np.where(near[..., None], s.BACKGROUND + soft * (colour - s.BACKGROUND), image).round().astype(np.uint8)
    elif kind == "half":
        side = (x < o.x, x > o.x, y < o.y, y > o.y)[rng.integers(4)]
        image[near & side] = s.BACKGROUND
    elif kind == "extra":
        taken = (np.abs(image.astype(int) - s.BACKGROUND[0]).max(-1) > 20).astype(np.uint8)
        free = cv2.dilate(taken, np.ones((11, 11), np.uint8)) == 0
        free[:4], free[-4:], free[:, :4], free[:, -4:] = False, False, False, False
        places = np.argwhere(free)
        if not len(places):
            return damage(image, scene, rng)
        cy, cx = places[rng.integers(len(places))]
        image[cy - 2 : cy + 3, cx - 2 : cx + 3] = list(s.COLOURS.values())[rng.integers(8)]
    else:  # a bar of the object's colour from its middle on, as where two objects run together
        length, half = int(1.8 * radius), max(int(radius / 3), 1)
        along = 1 if o.x < size / 2 else -1
        xs = np.clip(np.array([o.x, o.x + along * length]).astype(int), 0, size)
        row = int(o.y)
        image[max(row - half, 0) : row + half + 1, min(xs) : max(xs)] = colour
    return kind, image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--damaged", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()
    rng = np.random.default_rng([args.seed, 99])
    jpeg = [cv2.IMWRITE_JPEG_QUALITY, 90, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    totals = dict.fromkeys(("plain", "noise", "jpeg", "flipped", "damaged"), 0)
    wrong = dict.fromkeys(totals, 0)
    seconds = 0.0
    for start in range(0, args.count, 2000):
        indices = range(start, min(start + 2000, args.count))
        scenes = [s.example("test", i, args.seed + 1)[0] for i in indices]
        images = np.stack([s.render(scene) for scene in scenes])
        noise = np.clip(images + rng.integers(-8, 9, images.shape), 0, 255).astype(np.uint8)
        again: list[Any] = [cv2.imdecode(cv2.imencode(".jpg", image, jpeg)[1], cv2.IMREAD_COLOR) for image in images]
        packed = np.stack(again)
        cases = {"plain": (images, scenes), "noise": (noise, scenes), "jpeg": (packed, scenes)}
        cases["flipped"] = (images, [flip(scene, rng) for scene in scenes])
        if start < args.damaged:
            kinds, damaged = zip(*(damage(i, sc, rng) for i, sc in zip(images, scenes, strict=True)), strict=True)
            cases["damaged"] = (np.stack(damaged), scenes)
        for name, (pictures, asked) in cases.items():
            began = time.perf_counter()
            exact = verify(pictures, asked).exact
            seconds += (time.perf_counter() - began) if name == "plain" else 0.0
            bad = ~exact if name in ("plain", "noise", "jpeg") else exact
            totals[name] += len(exact)
            wrong[name] += int(bad.sum())
            for i in np.flatnonzero(bad)[:3]:
                detail = kinds[i] if name == "damaged" else s.caption(asked[i])
                print(f"wrong: {name} {indices[i]}: {s.caption(scenes[i])} | {detail}")
    result: dict[str, Any] = {name: {"pictures": totals[name], "wrong": wrong[name]} for name in totals}
    result["images_per_sec"] = totals["plain"] / seconds
    result["cores"] = os.cpu_count()
    for name in totals:
        print(f"{name:8s} {totals[name]:7d} pictures, {wrong[name]} judged wrongly")
    print(f"{result['images_per_sec']:.0f} images/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
