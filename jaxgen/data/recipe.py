"""What a data set has to say to be prepared: one file with a Recipe, one line in data/registry.py."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import cv2
import numpy as np

cv2.setNumThreads(0)  # the pipeline has threads of its own


class Example(NamedTuple):
    """key: unique in its split. image: the encoded file. captions: one is drawn at each visit. meta: JSON or ""."""

    key: str
    image: bytes
    captions: list[str]
    meta: str = ""


class Recipe(Protocol):
    flip: bool  # may a picture be mirrored without making its caption wrong?
    crop: bool  # may its border be cut?

    def identity(self) -> str:
        """Letters, digits and _ that tell apart the prepared sets this recipe can make. Raises UserError where the
        source is missing or empty."""
        ...

    def splits(self) -> tuple[str, ...]: ...

    def examples(self, split: str) -> Iterator[Example]: ...


def decode(data: bytes) -> np.ndarray | None:
    """RGB uint8 [H, W, 3] of an encoded picture, transparency laid on white; None where it cannot be read."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if image is None:
        return None
    if image.dtype == np.uint16:
        image = (image // 256).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 4:
        alpha = image[:, :, 3:].astype(np.float32) / 255
        image = np.round(image[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """The picture's central square, resized to [size, size, 3]."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(square)
    return cv2.resize(square, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)
