"""How far apart the pictures of one prompt lie: near zero where a generator has collapsed to one picture a prompt."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

IMAGES = 4  # of each prompt


class Draws(Protocol):
    """What is judged: a jaxgen.Model, or anything that draws as one does."""

    sample: Callable[..., np.ndarray]


def diversity(model: Draws, prompts: Sequence[str], seed: int = 0) -> float:
    """Root mean square difference of two pictures of one prompt, as a share of the range of a pixel: the mean over the
    pairs among IMAGES of each prompt."""
    images = model.sample(prompts, num_images=IMAGES, seed=seed)
    return float(np.mean([distances(some) for some in images.reshape(len(prompts), IMAGES, *images.shape[1:])]))


def correct_diversity(images: np.ndarray, exact: np.ndarray) -> float:
    """The same among those pictures alone that show what their prompt asks for: a generator that draws one right picture
    each time has none. uint8 [prompts, images, H, W, C] and bool [prompts, images]; a mean over prompts of which two or
    more pictures are right, NaN where there is no such prompt."""
    means = [np.mean(distances(some[right])) for some, right in zip(images, exact, strict=True) if right.sum() > 1]
    return float(np.mean(means)) if means else float("nan")


def distances(images: np.ndarray) -> np.ndarray:
    """float64 [N (N - 1) / 2]: the root mean square difference of each two of N pictures, uint8 [N, H, W, C], over 255."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    first, second = np.triu_indices(len(images), k=1)
    return np.array([np.sqrt(np.mean(np.square(flat[i] - flat[j]))) for i, j in zip(first, second, strict=True)])
