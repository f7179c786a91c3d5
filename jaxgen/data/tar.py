"""Tar shards as WebDataset and img2dataset write them: 000.jpg and 000.txt (or 000.json with a "caption") side by side."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxgen.data import remote
from jaxgen.data.recipe import size_of
from jaxgen.data.remote import Lost
from jaxgen.data.shards import Format, Records, Scan, clipped, left_out

BLOCK = 512
PICTURES = ("jpg", "jpeg", "png", "webp")
# Read at a time while looking through a shard. On a disk bodies are skipped; elsewhere a jump costs a round trip.
CHUNK, REMOTE_CHUNK = 2**13, 2**22
HEAD = 2**12  # of a picture: most say within it how large they are
ROW = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("length", "<i4"), ("height", "<u2"), ("width", "<u2")])
CAPTIONS = ("caption", "captions", "text")  # fields of a .json


class Member(NamedTuple):
    name: str
    offset: int  # of its content
    length: int


class TarRecords(Records):
    def image(self, url: str, row: np.void) -> bytes:
        return remote.read(url, int(row["offset"]), int(row["length"]))


def scan(url: str, size: int, field: str | None, sized: bool = False) -> Scan:
    """Every picture of a shard that has a caption, in the order of their places. A text is one caption; members belong
    together whose names are alike up to the first dot after the last slash. Raises Lost for what is no whole tar."""
    content = _window(url, size)
    pictures: dict[str, Member] = {}
    sizes: dict[str, tuple[int, int] | None] = {}
    captions: dict[str, list[str]] = {}
    for member in members(content, size):
        directory, slash, base = member.name.rpartition("/")
        stem, dot, ending = base.partition(".")
        key, ending = directory + slash + stem, ending.lower()
        if not stem or not dot:
            continue
        if ending in PICTURES:
            if sized and key not in pictures:
                sizes[key] = size_of(content(member.offset, min(member.length, HEAD)))
                sizes[key] = sizes[key] or size_of(content(member.offset, member.length))
            pictures.setdefault(key, member)
        elif ending == "txt" and not field:
            captions[key] = _clean(content(member.offset, member.length).decode(errors="replace")) or captions.get(key, [])
        elif ending == "json" and not captions.get(key):
            captions[key] = _of_json(content(member.offset, member.length), field)
    said = [key for key, member in pictures.items() if captions.get(key) and member.length]
    keys = [key for key in said if not sized or sizes[key]]
    rows: np.ndarray = np.array([(0, *pictures[key][1:], 0, 0) for key in keys], ROW)
    if sized:
        rows["height"], rows["width"] = clipped([sizes[key] or (0, 0) for key in keys])
    shard = url.rpartition("/")[2]
    hashes = [hashlib.blake2b(f"{shard}/{key}".encode(), digest_size=8).digest() for key in keys]
    problems = left_out(len(pictures), len(said), len(keys))
    return Scan(rows, [captions[key] for key in keys], np.frombuffer(b"".join(hashes), np.uint64), problems)


def members(content: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
    """The files of a tar (ustar, GNU or pax), `content(offset, length)` reading it. Raises Lost where it is damaged or ends
    early. The standard library's tarfile says the same at twenty times the cost, which ten million pictures would feel."""
    offset, long_name, extended = 0, "", {}
    while offset < size:
        if offset + BLOCK > size:
            break
        header = content(offset, BLOCK)
        if not header.strip(b"\0"):
            return
        if _number(header[148:156], offset) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise Lost("no tar" if offset == 0 else f"no tar's header at byte {offset}")
        length = int(extended.get("size", _number(header[124:136], offset)))
        kind = header[156:157]
        body = length if kind not in b"123456" else 0  # links, devices and directories have none
        offset += BLOCK
        if offset + body > size:
            raise Lost(f"cut short at byte {size}")
        if kind == b"L":
            long_name = _text(content(offset, body))
        elif kind == b"x":
            extended = _pax(content(offset, body), offset)
        elif kind not in b"gK":
            if kind in b"0\x007":
                name = _text(header[:100])
                if header[257:263] == b"ustar\0" and header[345]:
                    name = f"{_text(header[345:500])}/{name}"
                yield Member(extended.get("path", long_name or name), offset, length)
            long_name, extended = "", {}
        offset += -(-body // BLOCK) * BLOCK
    if offset != size:
        raise Lost(f"cut short at byte {size}")


def _window(url: str, size: int) -> Callable[[int, int], bytes]:
    """Reads at rising places, a chunk at a time."""
    chunk = REMOTE_CHUNK if remote.is_remote(url) else CHUNK
    start, held = 0, b""

    def content(offset: int, length: int) -> bytes:
        nonlocal start, held
        if not start <= offset <= offset + length <= start + len(held):
            start, held = offset, remote.read(url, offset, min(max(length, chunk), size - offset))
        return held[offset - start : offset - start + length]

    return content


def _number(field: bytes, offset: int) -> int:
    if field[0] & 0x80:  # GNU's way with sizes from 8 GB on
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        raise Lost("no tar" if offset == 0 else f"no tar's header at byte {offset}") from None


def _pax(body: bytes, offset: int) -> dict[str, Any]:
    """Records "LENGTH KEY=VALUE\\n" of an extended header."""
    found = {}
    while body:
        length, space, _ = body.partition(b" ")
        if not space or not length.isdigit() or not len(length) < int(length) <= len(body):
            raise Lost(f"a damaged pax header at byte {offset}")
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode(errors="replace")] = value.decode(errors="replace")
        body = body[int(length) :]
    return found


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="replace")


def _clean(caption: str) -> list[str]:
    return [line] if (line := " ".join(caption.split())) else []


def _of_json(data: bytes, field: str | None) -> list[str]:
    try:
        said = json.loads(data)
    except ValueError:
        return []
    for name in (field,) if field else CAPTIONS:
        value = said.get(name) if isinstance(said, dict) else None
        values = value if isinstance(value, list) else [value]
        captions = [caption for text in values if isinstance(text, str) for caption in _clean(text)]
        if captions:
            return captions
    return []


FORMAT = Format("tar", ".tar", ROW, scan, TarRecords)
