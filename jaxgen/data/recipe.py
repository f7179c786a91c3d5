"""What a data set has to say to be prepared: one file with a Recipe, one line in data/registry.py."""

import io
import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from PIL import ExifTags, Image

cv2.setNumThreads(0)  # the pipeline has threads of its own

JPEG = b"\xff\xd8\xff"


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
    """RGB uint8 [H, W, 3] of an encoded picture, transparency laid on white, a photograph the right way up; None where it
    cannot be read."""
    # Left unchanged, a picture keeps its transparency; a JPEG, which has none, would lie as the camera was held.
    jpeg = data[: len(JPEG)] == JPEG
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB if jpeg else cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None
    if image is None or jpeg:
        return image
    if image.dtype == np.uint16:
        image = (image // 256).astype(np.uint8)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if image.shape[2] == 4:
        alpha = image[:, :, 3:].astype(np.float32) / 255
        image = np.round(image[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def size_of(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an encoded picture as `decode` gives it; its first bytes are enough, but for WebP. None where they
    do not tell."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.format == "JPEG" and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):  # what Pillow raises of bad files
        return None
    return (width, height) if turned else (height, width)


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest part of the picture's middle that has these proportions, resized to [height, width, 3]."""
    high, wide = image.shape[:2]
    tall, broad = min(high, round(wide * height / width)), min(wide, round(high * width / height))
    tall, broad = max(tall, 1), max(broad, 1)
    top, left = (high - tall) // 2, (wide - broad) // 2
    part = image[top : top + tall, left : left + broad]
    if (tall, broad) == (height, width):
        return np.ascontiguousarray(part)
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA if tall > height else cv2.INTER_CUBIC)
