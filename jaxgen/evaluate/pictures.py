"""Captioned sheets of pictures, and PNG files that say how they were made."""

import functools
import io
import json
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from jaxgen.storage import Path, write_bytes

MARGIN, LINE = 6, 13
# Fonts with Chinese, Japanese and Korean signs, which Pillow's own lacks, as systems and distributions call them.
CJK = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "PingFang.ttc", "msyh.ttc")


def sheet(images: Sequence[np.ndarray], captions: Sequence[str], columns: int | None = None, cell: int = 128) -> np.ndarray:
    """uint8 [H, W, 3]: pictures (uint8 [h, w, 3], any size) enlarged to about `cell` pixels, each over its caption."""
    columns = columns or min(len(images), max(4, round(len(images) ** 0.5)))
    # Such a sign is twice as wide as a letter.
    wrapped = [textwrap.wrap(caption, max(cell, 48) // (12 if wide(caption) else 6))[:4] for caption in captions]
    plain, full = ImageFont.load_default(11), cjk_font() if any(map(wide, captions)) else None
    pictures = [_enlarged(Image.fromarray(image), cell) for image in images]
    tall = max(picture.height for picture in pictures)
    height = tall + LINE * max(map(len, wrapped), default=0) + MARGIN
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, rows * (height + MARGIN) + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for k, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x, y = MARGIN + k % columns * (cell + MARGIN), MARGIN + k // columns * (height + MARGIN)
        page.paste(picture, (x, y))
        for number, line in enumerate(lines):
            draw.text((x, y + tall + 2 + number * LINE), line, fill="black", font=full if full and wide(line) else plain)
    return np.asarray(page)


def _enlarged(picture: Image.Image, side: int) -> Image.Image:
    """With `side` pixels along its longer side. Few pixels are shown as they are; many are averaged."""
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)


def wide(text: str) -> bool:
    """Whether there are Chinese, Japanese or Korean signs in it."""
    return any("\u2e80" <= sign <= "\uffef" for sign in text)


@functools.cache
def cjk_font() -> Any:
    """The first of CJK that the system has; None where it has none, and boxes stand for the signs."""
    for name in CJK:
        try:
            return ImageFont.truetype(name, 11)
        except OSError:
            continue
    return None


def encode_png(image: np.ndarray, metadata: dict[str, Any]) -> bytes:
    """PNG bytes of uint8 [H, W, 3], `metadata` as text chunks (JSON where it is no string)."""
    info = PngInfo()
    for name, value in metadata.items():
        info.add_itxt(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: Path, image: np.ndarray, metadata: dict[str, Any]) -> None:
    write_bytes(path, encode_png(image, metadata))


def save_gif(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 120) -> None:
    """An endless GIF of uint8 [H, W, 3] frames; the last one stays for two seconds."""
    pages = [Image.fromarray(frame) for frame in frames]
    buffer, times = io.BytesIO(), [milliseconds] * (len(pages) - 1) + [2000]
    pages[0].save(buffer, "GIF", save_all=True, append_images=pages[1:], duration=times, loop=0)
    write_bytes(path, buffer.getvalue())


def read_metadata(path: Path) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()
        return {name: str(value) for name, value in getattr(image, "text", {}).items()}
