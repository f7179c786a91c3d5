"""Pictures in their own proportions: each falls into one of few shapes (buckets) that have about as many pixels as a square of
`data.image_size`, and a batch is of one shape, so that few programs are compiled and nothing is padded (as in NovelAI's
improvements on Stable Diffusion, 2022)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgen.errors import UserError

PARTS = 8  # sides are multiples of the square's side over this
CYCLE = 4096  # batches after which the order of shapes begins anew

Size = tuple[int, int]  # height, width


def shapes(size: int, widest: float) -> list[Size]:
    """All shapes up to `widest` times as wide as high, or as high as wide, from the highest to the widest; the square is one
    of them. Raises UserError where the side is not to be divided so."""
    if widest > 1 and size % PARTS:
        raise UserError(
            f"data.image_size={size} is no multiple of {PARTS}: pictures of other proportions are made of its eighths"
        )
    step = size // PARTS
    pairs = [(a, PARTS**2 // a) for a in range(1, PARTS + 1)]
    wide = [(a * step, b * step) for a, b in pairs if a < b and b / a <= widest]
    return [(b, a) for a, b in wide] + [(size, size)] + wide[::-1]


def nearest(sizes: np.ndarray, among: Sequence[Size]) -> np.ndarray:
    """Of each of `sizes` [N, 2] (height, width) the shape whose proportions are nearest, by its place among those given, which
    rise from the highest to the widest."""
    ratio = lambda pairs: np.log(pairs[:, 1] / pairs[:, 0], dtype=np.float32)  # noqa: E731
    own = ratio(np.asarray(among))
    return np.searchsorted((own[1:] + own[:-1]) / 2, ratio(np.asarray(sizes)))


class BucketOrder:
    """order[position] of a run whose batches are of one bucket each, every bucket as often as it has pictures.

    A function of the position alone, as the order of `streams` is: the step stays the whole state of the input."""

    def __init__(self, members: Sequence[np.ndarray], streams: Sequence[Any], batch_size: int):
        """members: of each bucket its entries; none is empty. streams: of each bucket its order, which gives places among
        its entries."""
        self._members, self._streams, self._batch_size = members, streams, batch_size
        self.ahead = min(getattr(stream, "ahead", 0) for stream in streams)
        counts = np.array([len(some) for some in members])
        self._counts = np.maximum(np.round(CYCLE * counts / counts.sum()), 1).astype(int)
        # Evenly spread: so a bucket's batches come as its pictures are met.
        at = np.concatenate([(np.arange(count) + 0.5) / count for count in self._counts])
        turn = np.argsort(at, kind="stable")
        self._bucket = np.repeat(np.arange(len(counts)), self._counts)[turn]
        self._rank = np.concatenate([np.arange(count) for count in self._counts])[turn]

    def __getitem__(self, position: int) -> int:
        step, place = divmod(int(position), self._batch_size)
        cycle, turn = divmod(step, len(self._bucket))
        bucket = self._bucket[turn]
        batch = cycle * int(self._counts[bucket]) + int(self._rank[turn])
        return int(self._members[bucket][int(self._streams[bucket][batch * self._batch_size + place])])
