"""How often a model draws exactly what a caption asks for."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from jaxgen.data.scenes import KINDS, Scene, prompts
from jaxgen.evaluate.verifier import verify

ATTRIBUTES = ("exact", "count", "colour", "shape", "size", "relation")
NAMES = (*(f"eval/{name}" for name in ATTRIBUTES), *(f"eval/exact_{kind}" for kind in KINDS))  # of all shares


class Draws(Protocol):
    """What is judged: a jaxgen.Model, or anything that draws as one does."""

    sample: Callable[..., np.ndarray]


def accuracy(
    model: Draws, split: str = "validation", count: int = 1000, seed: int = 0, language: str = "en", **settings: Any
) -> dict[str, float]:
    """Draw one picture for each of `count` prompts of a split and judge it: shares under eval/ names, by kind too."""
    return judge(model, split, count, seed, language, **settings)[0]


def judge(
    model: Draws, split: str, count: int, seed: int = 0, language: str = "en", **settings: Any
) -> tuple[dict[str, float], np.ndarray, list[str], np.ndarray]:
    """(shares, pictures uint8 [N, S, S, 3], captions, exact bool [N])."""
    pairs = list(prompts(split, count, language=language))
    captions = [caption for caption, _ in pairs]
    images = model.sample(captions, seed=seed, **settings)
    shares, exact = score(images, [scene for _, scene in pairs])
    return shares, images, captions, exact


def score(images: np.ndarray, scenes: Sequence[Scene]) -> tuple[dict[str, float], np.ndarray]:
    """(shares, exact bool [N]) of pictures uint8 [N, S, S, 3] that are to show these scenes."""
    verdict = verify(images, scenes)
    shares = {f"eval/{name}": float(getattr(verdict, name).mean()) for name in ATTRIBUTES}
    kinds = np.array([scene.kind for scene in scenes])
    for kind in KINDS:
        if (kinds == kind).any():
            shares[f"eval/exact_{kind}"] = float(verdict.exact[kinds == kind].mean())
    return shares, verdict.exact
