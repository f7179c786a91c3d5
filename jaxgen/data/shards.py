"""Sets that stay where they lie, in many large files (shards): an index of all pictures is written once beside the prepared
sets, and each picture is then read by itself, from a disk, over HTTP or from an object store.

The index holds a row of fixed width a picture, and all captions. A shard is looked through once: what is found is kept in a
file of its own, so that work cut short goes on and a set that grows asks for its new shards only. Hosts that share data.dir
share this work. Rows are mapped and captions read from files, so that ten million pictures take a host some 300 MB, all of
it the system's to reclaim."""

import hashlib
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgen.data import remote
from jaxgen.data.remote import Lost
from jaxgen.errors import UserError
from jaxgen.parallel.runtime import synchronise
from jaxgen.storage import Path, as_path, explain, is_remote, write_bytes, write_json

VERSION = 2
LOCAL = "~/.cache/jaxgen/data"
SCANS = 16  # shards looked through at a time
READS = 64  # of pictures over a network at a time: a round trip of 50 ms leaves a single reader 20 of them a second
HELD_OUT = (20, 4096)  # for validation one picture in so many, and at most so many
INDEX = "index.json"  # of an index; it is there when this is


class Scan(NamedTuple):
    """What is in a shard: `rows` of the format's dtype with "shard" left at 0, captions of each (no line breaks in them),
    uint64 keys by whose order pictures are held out (those with one key stay together), and counts of what was left out."""

    rows: np.ndarray
    captions: list[list[str]]
    keys: np.ndarray
    problems: dict[str, int]


class Format(NamedTuple):
    """A kind of shard. `scan` takes (url, bytes, caption field, whether rows are to say each picture's "height" and "width")
    and raises Lost; `records` opens a split of an index."""

    name: str
    ending: str
    dtype: np.dtype
    scan: Callable[[str, int, str | None, bool], Scan]
    records: "Callable[[ShardSet, Index, str], Records]"


@dataclass(frozen=True)
class ShardSet:
    """The recipe of a set in shards (its pictures are not prepared, only indexed). Not mirrored or cropped unless asked."""

    format: Format
    pattern: str
    caption_field: str | None = None
    max_bad_shards: int = 10
    window: int = 128  # MB
    sized: bool = False  # the index says how high and wide each picture is
    flip = False
    crop = False

    @cached_property
    def shards(self) -> list[tuple[str, int | Lost]]:
        """(url, bytes or why it cannot be read) of each."""
        urls = listing(self.pattern, self.format.ending)
        losses = Losses(self, len(urls))

        def measure(url: str) -> int | Lost:
            try:
                return remote.size(url)
            except Lost as lost:
                losses.add(url, lost)
                return lost

        return list(zip(urls, concurrently(measure, urls, READS), strict=True))

    def identity(self) -> str:
        told = [f"{url} {-1 if isinstance(size, Lost) else size}" for url, size in self.shards]
        return f"v{VERSION}_{_digest(self.format.name, self.caption_field, self.sized, *told)}"

    def records(self, split: str, root: Path) -> "Records":
        """A split, indexed first where that is needed. Raises UserError where more than max_bad_shards cannot be read."""
        return self.format.records(self, index(self, root), split)


class Losses:
    """Shards that cannot be read: each is named once, and too many of them end the run."""

    def __init__(self, shards: ShardSet, count: int, why: dict[str, str] | None = None):
        self._set, self._count, self._lock = shards, count, threading.Lock()
        self.why = dict(why or {})

    def __contains__(self, url: str) -> bool:
        return url in self.why

    def add(self, url: str, lost: Lost) -> None:
        with self._lock:
            if url in self.why:
                return
            self.why[url] = str(lost)
            if len(self.why) > self._set.max_bad_shards or len(self.why) == self._count:
                raise self.error()
            print(f"data: left out {url}: {lost}", file=sys.stderr, flush=True)

    def error(self) -> UserError:
        some = "; ".join(f"{url}: {why}" for url, why in list(self.why.items())[:3])
        limit = f"more than data.max_bad_shards={self._set.max_bad_shards}" if len(self.why) < self._count else "all of them"
        return UserError(
            f"data.name={self._set.format.name}: {len(self.why)} of {self._count} shards cannot be read, {limit} ({some})"
        )


class Index:
    """A finished index in a directory of the local disk."""

    def __init__(self, directory: Path, shards: ShardSet):
        self.directory = directory
        told = json.loads((directory / INDEX).read_text())
        self.urls: list[str] = told["shards"]
        self.sizes: list[int] = told["sizes"]  # bytes
        self.splits: dict[str, int] = told["splits"]  # pictures
        self.problems: dict[str, int] = told["problems"]
        self.lost: dict[str, str] = told["lost"]
        self.dtype = shards.format.dtype

    def rows(self, split: str) -> np.ndarray:
        return np.asarray(np.memmap(self.directory / f"{split}.rows", self.dtype, "r"))

    def ends(self, split: str) -> np.ndarray:
        return np.asarray(np.memmap(self.directory / f"{split}.ends", np.int64, "r"))


class Records:
    """A split by index: encoded picture, captions, meta; a format says how `image` reads a picture.

    The picture is None where its shard has been lost since it was indexed."""

    reads = READS

    def __init__(self, shards: ShardSet, index: Index, split: str):
        if not index.splits.get(split):
            known = ", ".join(name for name, count in index.splits.items() if count)
            mend = " (eval.every=0 trains without)" if split == "validation" else ""
            raise UserError(f"data.name={shards.format.name}: has no split {split!r}; it has {known}{mend}")
        self.rows, self._ends = index.rows(split), index.ends(split)
        # Read and not mapped: a caption's page need not count as this process's memory.
        self._captions = os.open(index.directory / f"{split}.captions", os.O_RDONLY)
        self.urls = index.urls
        self.threads = self.reads if any(remote.is_remote(url) for url in index.urls) else 4
        self.losses = Losses(shards, len(index.urls) + len(index.lost), index.lost)

    def __del__(self) -> None:
        if hasattr(self, "_captions"):
            os.close(self._captions)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[bytes | None, list[str], str]:
        row = self.rows[index]
        url = self.urls[row["shard"]]
        if url in self.losses:
            return None, [], ""
        try:
            return self.image(url, row), self.captions_of(index), ""
        except Lost as lost:
            self.losses.add(url, lost)
            return None, [], ""

    def image(self, url: str, row: np.void) -> bytes:
        raise NotImplementedError

    @property
    def sizes(self) -> np.ndarray:
        """uint16 [N, 2]: height and width of each picture, of a set whose index says them."""
        return np.stack([self.rows["height"], self.rows["width"]], axis=1)

    def orders(self, seed: int, batch_size: int, members: Sequence[np.ndarray] | None = None) -> Sequence[Any] | None:
        """order[position], the entry there, of a run over all; or, for each of `members`, of one over those alone by their
        places there. None where these are the usual shuffle."""
        return None

    def expect(self, entries: np.ndarray) -> None:
        """These are wanted soon."""

    def captions_of(self, index: int) -> list[str]:
        start = int(self._ends[index - 1]) if index else 0
        return os.pread(self._captions, int(self._ends[index]) - start, start).decode().split("\n")


def listing(pattern: str, ending: str) -> list[str]:
    """Shards that a pattern names: files, directories of them, {00000..00099} and {a,b} in either, and commas between.

    Raises UserError where a directory has none, and for braces that do not fit."""
    found: list[str] = []
    for part in re.split(r",(?![^{}]*\})", pattern):
        for url in expand(part.strip()):
            if url.startswith(("http://", "https://")):
                if url.endswith("/"):
                    raise UserError(f"{url}: HTTP lists no directories: name the shards, as in {url}{{00000..00099}}{ending}")
                found.append(url)
            elif url:
                url = os.path.expanduser(url)
                if url.endswith("/") or (not remote.is_remote(url) and os.path.isdir(url)):
                    inside = sorted(file for file in remote.directory(url) if file.endswith(ending))
                    if not inside:
                        raise UserError(f"{url}: no {ending} files in it")
                    found += inside
                else:
                    found.append(url)
    if not found:
        raise UserError(
            f"{pattern!r} names no shard: give files, a directory, or a pattern such as DIR/{{00000..00099}}{ending}"
        )
    return list(dict.fromkeys(found))


def expand(pattern: str) -> list[str]:
    """Braces as a shell expands them, numbers with their zeros: "a{08..10}" gives a08, a09, a10; "{x,y}" x and y."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"{pattern!r}: a brace without its pair")
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    if span is not None and int(span[1]) <= int(span[2]):
        width = max(len(end) for end in span.groups()) if any(len(end) > 1 and end[0] == "0" for end in span.groups()) else 0
        choices = [f"{number:0{width}d}" for number in range(int(span[1]), int(span[2]) + 1)]
    elif "," in brace[1]:
        choices = brace[1].split(",")
    else:
        raise UserError(f"{pattern!r}: {brace[0]} is neither numbers from low to high, {{000..099}}, nor a choice, {{a,b}}")
    return [one for choice in choices for one in expand(pattern[: brace.start()] + choice + pattern[brace.end() :])]


def index(shards: ShardSet, root: Path) -> Index:
    """The index of a set, written first where it is missing; each process looks through its share of the shards."""
    name = f"{shards.format.name}/{shards.identity()}"
    directory = (as_path(LOCAL) if is_remote(root) else root) / "shards" / name
    if not _everywhere((directory / INDEX).exists()):
        losses = _unreachable(shards)
        wanted = [(url, size) for url, size in shards.shards if not isinstance(size, Lost)]
        made = (VERSION, shards.format.name, shards.caption_field, shards.sized)
        parts = {url: root / "shards" / "parts" / f"{_digest(*made, url, size)}.npz" for url, size in wanted}
        share = wanted[jax.process_index() :: jax.process_count()]
        _scan_all(shards, share, parts, losses)
        synchronise(f"looked through {name}")
        _scan_all(shards, wanted, parts, losses)  # nothing is left to do where the hosts share `root`
        if jax.process_index() == 0:
            _join(shards, [(url, parts[url]) for url, _ in wanted], directory)
        synchronise(f"indexed {name}")
        if not (directory / INDEX).exists():
            _join(shards, [(url, parts[url]) for url, _ in wanted], directory)
    found = Index(directory, shards)
    _check_alike(directory, found)
    if len(found.lost) > shards.max_bad_shards:
        raise Losses(shards, len(shards.shards), found.lost).error()
    if found.lost and jax.process_index() == 0:
        told = ", ".join([*found.lost][:3]) + (", …" if len(found.lost) > 3 else "")
        print(f"data: {len(found.lost)} of {len(shards.shards)} shards are left out: {told}", file=sys.stderr, flush=True)
    return found


def concurrently(work: Callable[[Any], Any], items: Sequence[Any], threads: int) -> Iterator[Any]:
    """`work` of each item, in order; the first error ends what has not begun."""
    with ThreadPoolExecutor(threads, "shards") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _unreachable(shards: ShardSet) -> Losses:
    return Losses(shards, len(shards.shards), {url: str(size) for url, size in shards.shards if isinstance(size, Lost)})


def _scan_all(shards: ShardSet, some: list[tuple[str, int]], parts: dict[str, Path], losses: Losses) -> None:
    there = {path.name for path in parts[some[0][0]].parent.iterdir()} if some and parts[some[0][0]].parent.exists() else set()
    missing = [(url, size) for url, size in some if parts[url].name not in there]
    if not missing:
        return

    def work(shard: tuple[str, int]) -> None:
        url, size = shard
        try:
            found = shards.format.scan(url, size, shards.caption_field, shards.sized)
            said = ["\n".join(captions).encode() for captions in found.captions]
            part: dict[str, Any] = {
                "rows": found.rows,
                "keys": found.keys,
                "ends": np.cumsum([len(text) for text in said], dtype=np.int64),
                "captions": np.frombuffer(b"".join(said), np.uint8),
                "problems": np.array(json.dumps(found.problems)),
            }
        except Lost as lost:
            losses.add(url, lost)
            part = {"lost": np.array(str(lost))}
        buffer = io.BytesIO()
        np.savez(buffer, **part)
        write_bytes(parts[url], buffer.getvalue())

    print(f"looking through {len(missing)} shards of {len(parts)}", file=sys.stderr, flush=True)
    began = told = time.monotonic()
    for done, _ in enumerate(concurrently(work, missing, SCANS), 1):
        if time.monotonic() - told > 5:
            told = time.monotonic()
            left = (told - began) / done * (len(missing) - done)
            print(f"looked through {done} of {len(missing)} shards, {left:.0f} s left", file=sys.stderr, flush=True)


def _join(shards: ShardSet, parts: list[tuple[str, Path]], directory: Path) -> None:
    """Parts into one index, a part at a time; captions stay on the disk."""
    losses, problems, keys = _unreachable(shards), {}, []
    kept: list[tuple[str, Path]] = []
    for url, path in parts:
        part = _read_part(path)
        if "lost" in part:
            losses.why[url] = str(part["lost"])
            continue
        kept.append((url, path))
        keys.append(part["keys"])
        for problem, count in json.loads(str(part["problems"])).items():
            problems[problem] = problems.get(problem, 0) + count
    if len(losses.why) > shards.max_bad_shards or not kept:
        raise losses.error()
    held = _held_out(np.concatenate(keys), [len(some) for some in keys])
    splits = {"train": 0, "validation": 0}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Under names of their own until all is written: two runs may be doing this at once.
        names = [f"{split}.{what}" for split in splits for what in ("rows", "ends", "captions")]
        files = {name: open(directory / f".{name}.{os.getpid()}", "wb") for name in names}  # noqa: SIM115
        written = dict.fromkeys(splits, 0)  # bytes of captions
        for number, ((_, path), out) in enumerate(zip(kept, held, strict=True)):
            part = _read_part(path)
            rows, ends, captions = part["rows"], part["ends"], part["captions"].tobytes()
            rows["shard"] = number
            starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
            for split, chosen in (("train", ~out), ("validation", out)):
                splits[split] += int(chosen.sum())
                rows[chosen].tofile(files[f"{split}.rows"])
                (written[split] + np.cumsum((ends - starts)[chosen])).tofile(files[f"{split}.ends"])
                text = b"".join(captions[a:b] for a, b in zip(starts[chosen], ends[chosen], strict=True))
                files[f"{split}.captions"].write(text)
                written[split] += len(text)
        for name, file in files.items():
            file.close()
            os.replace(file.name, directory / name)
    except OSError as error:
        raise explain(error, directory) from error
    if not splits["train"]:
        raise UserError(
            f"data.name={shards.format.name}: not one picture with a caption ({problems or 'the shards are empty'})"
        )
    urls, sizes = [url for url, _ in kept], dict(shards.shards)
    told = {"splits": splits, "problems": problems, "lost": losses.why, "shards": urls, "sizes": [sizes[url] for url in urls]}
    write_json(directory / INDEX, told)
    if problems:
        print(f"data: left out {', '.join(f'{count} {problem}' for problem, count in problems.items())}", file=sys.stderr)


def _held_out(keys: np.ndarray, counts: list[int]) -> list[np.ndarray]:
    """bool of each picture of each shard: is it kept for validation?"""
    share, most = HELD_OUT
    if len(np.unique(keys)) < 2 * share:  # too few that stay together (a parquet file's row groups): one by one
        keys = keys ^ (np.arange(1, len(keys) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    count = max(min(len(keys) // share, most), min(1, len(keys) - 1))
    held = keys <= np.sort(keys)[count - 1] if count > 0 else np.zeros(len(keys), bool)
    return np.split(held, np.cumsum(counts)[:-1])


def _read_part(path: Path) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(path.read_bytes())) as part:
        return dict(part)


def left_out(pictures: int, captioned: int, kept: int) -> dict[str, int]:
    """Scan.problems of a shard where so many have a caption, and of these so many can be read."""
    found = {"without a caption": pictures - captioned, "unreadable": captioned - kept}
    return {problem: count for problem, count in found.items() if count}


def clipped(sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """uint16 [2, N]: heights and widths, for a row; what is larger has the largest."""
    return np.minimum(np.array(sizes).reshape(-1, 2), np.iinfo(np.uint16).max).astype(np.uint16).T


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _everywhere(here: bool) -> bool:
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(np.all(multihost_utils.process_allgather(np.array(here))))


def _check_alike(directory: Path, found: Index) -> None:
    """Hosts with different indexes would learn from different batches and not know it."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        told = int(_digest(found.urls, found.splits)[:7], 16)
        if len(set(np.asarray(multihost_utils.process_allgather(np.array(told))).tolist())) > 1:
            raise UserError(f"{directory}: hosts found different shards: delete it on all of them, or share data.dir")
