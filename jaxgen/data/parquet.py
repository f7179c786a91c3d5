"""Parquet shards with a column of encoded pictures and one of captions, as Hugging Face `datasets` writes them.

A parquet file cannot be read picture by picture, only a row group at a time. So the order of an epoch is drawn in two
stages, still a function of the seed and the position alone: row groups are shuffled over the whole set, and their pictures
within windows of as many row groups as data.window megabytes hold (a set that fits into one window is shuffled as any other).
In each batch the pictures of a row group stand together, so that of many processes each reads its own groups, once."""

import functools
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from jaxgen.data import remote
from jaxgen.data.recipe import size_of
from jaxgen.data.remote import Lost
from jaxgen.data.shards import Format, Index, Records, Scan, ShardSet, clipped, left_out
from jaxgen.storage import first_line

# bytes: of its group over its rows.
ROW = np.dtype([(name, "<i4") for name in ("shard", "group", "row", "bytes")] + [("height", "<u2"), ("width", "<u2")])
PICTURES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "img", "picture", "bytes")
CAPTIONS = ("caption", "captions", "text", "txt", "prompt", "sentence", "sentences", "description")

T = TypeVar("T")


class ParquetRecords(Records):
    """Keeps the row groups read last: two windows of them, and those of the pictures that are under way."""

    reads = 16  # each of a whole row group

    def __init__(self, shards: ShardSet, index: Index, split: str):
        super().__init__(shards, index, split)
        self._sizes = index.sizes
        fresh = (np.diff(self.rows["shard"]) != 0) | (np.diff(self.rows["group"]) != 0)
        self.starts = np.concatenate([[0], np.flatnonzero(fresh) + 1, [len(self.rows)]])  # entries with which groups begin
        mean = float(self.rows["bytes"].mean(dtype=np.float64)) * len(self.rows) / (len(self.starts) - 1)
        self.window = max(2, int(shards.window * 2**20 / max(mean, 1)))  # groups
        self._footer, self._group = Kept(self._read_footer, 256), Kept(self._read_group, 2 * self.window + 2)
        self._ahead = ThreadPoolExecutor(self.reads, "parquet")

    def image(self, url: str, row: np.void) -> bytes:
        return self._group((int(row["shard"]), int(row["group"])))[int(row["row"])].as_py() or b""

    def orders(self, seed: int, batch_size: int, members: Sequence[np.ndarray] | None = None) -> Sequence["WindowShuffle"]:
        # Those of several parts meet the row groups in the same order, side by side, each with a window of its own.
        every = [self.starts] if members is None else [np.searchsorted(some, self.starts) for some in members]
        under_way = max(3 * batch_size, 8 * self.threads) * (len(self.starts) - 1) // len(self)
        self._group.most = len(every) * (2 * self.window + 2) + under_way
        return [WindowShuffle(starts, self.window, seed, batch_size) for starts in every]

    def expect(self, entries: np.ndarray) -> None:
        rows = self.rows[entries]
        for shard, group in sorted({*zip(rows["shard"].tolist(), rows["group"].tolist(), strict=True)}):
            if (shard, group) not in self._group and self.urls[shard] not in self.losses:
                self._ahead.submit(self._group, (shard, group))  # an error comes again where the picture is wanted

    def _read_footer(self, shard: int) -> Any:
        return _guarded(lambda: _open(self.urls[shard], self._sizes[shard]).metadata)

    def _read_group(self, key: tuple[int, int]) -> Any:
        """The pictures of a row group, a pyarrow array of binaries."""
        shard, group = key
        footer = self._footer(shard)
        name, _ = _columns(footer.schema.to_arrow_schema(), None, captioned=False)

        return _guarded(lambda: _pictures(_open(self.urls[shard], self._sizes[shard], footer), group, name))


class WindowShuffle:
    """order[position]: the entry there. Entries starts[g] to starts[g + 1] are row group g."""

    def __init__(self, starts: np.ndarray, window: int, seed: int, batch_size: int):
        self._starts, self._window, self._seed, self._batch_size = starts, window, seed, batch_size
        self._size = int(starts[-1])
        mean = self._size / (len(starts) - 1)
        self.ahead = max(1, int(window * mean / 2 / batch_size))  # steps in which the next window can come
        # Threads ask for the same step and window again and again.
        self._step = functools.lru_cache(64)(self._draw_step)
        self._mixed = functools.lru_cache(8)(self._draw_window)
        self._epoch = functools.lru_cache(2)(self._draw_epoch)

    def __getitem__(self, position: int) -> int:
        step, place = divmod(int(position), self._batch_size)
        return int(self._step(step)[place])

    def _draw_step(self, step: int) -> np.ndarray:
        """Entries of a batch in rising order, so row group by row group."""
        entries, first = [], step * self._batch_size
        while (missing := (step + 1) * self._batch_size - first) > 0:
            epoch, place = divmod(first, self._size)
            _, begins = self._epoch(epoch)
            window = int(np.searchsorted(begins, place, side="right")) - 1
            some = self._mixed(epoch, window)[place - begins[window] :][:missing]
            entries.append(some)
            first += len(some)
        return np.sort(np.concatenate(entries))

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row groups in their order, places of the epoch with which windows begin)."""
        groups = self._rng(1, 0, epoch).permutation(len(self._starts) - 1)
        ends = np.cumsum(np.diff(self._starts)[groups])
        return groups, np.concatenate([[0], ends[self._window - 1 : -1 : self._window]])

    def _draw_window(self, epoch: int, window: int) -> np.ndarray:
        groups = self._epoch(epoch)[0][window * self._window :][: self._window]
        entries = np.concatenate([np.arange(self._starts[g], self._starts[g + 1]) for g in groups])
        return self._rng(2, window, epoch).permutation(entries)

    def _rng(self, purpose: int, *counter: int) -> np.random.Generator:
        # Captions and crops are drawn from counters that begin with zeros (pipeline.batches).
        return np.random.Generator(np.random.Philox(key=self._seed, counter=[0, purpose, *counter]))


class Kept:
    """make(key) of the `most` keys asked for last; who asks for one that is being made waits for it."""

    def __init__(self, make: Callable[[Any], Any], most: int):
        self.most, self._make, self._lock = most, make, threading.Lock()
        self._found: OrderedDict[Any, Future[Any]] = OrderedDict()

    def __contains__(self, key: Any) -> bool:
        return key in self._found

    def __call__(self, key: Any) -> Any:
        with self._lock:
            future = self._found.pop(key, None)
            if ours := future is None:
                future = Future()
            self._found[key] = future
            while len(self._found) > self.most:
                self._found.popitem(last=False)
        if ours:
            try:
                future.set_result(self._make(key))
            except BaseException as error:
                with self._lock:
                    self._found.pop(key, None)
                future.set_exception(error)
        return future.result()


class _Ranged(io.RawIOBase):
    """A file that pyarrow reads part by part."""

    def __init__(self, url: str, size: int):
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        length = max(0, self._size - self._at if size < 0 else min(size, self._size - self._at))
        data = remote.read(self._url, self._at, length) if length else b""
        self._at += length
        return data


def scan(url: str, size: int, field: str | None, sized: bool = False) -> Scan:
    """Every picture of a shard that has a caption; only captions are read, but where rows are to be `sized`. Raises Lost for
    what is no parquet file or lacks such columns."""

    def read() -> Scan:
        file = _open(url, size)
        image, caption = _columns(file.schema_arrow, field)
        said = [_clean(value) for value in file.read(columns=[caption], use_threads=False).column(0).to_pylist()]
        rows, keys, shard = [], [], url.rpartition("/")[2]
        for group in range(file.metadata.num_row_groups):
            told = file.metadata.row_group(group)
            chunks = [told.column(k) for k in range(told.num_columns)]
            length = sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == image)
            part = np.zeros(told.num_rows, ROW)
            part["group"], part["row"], part["bytes"] = group, np.arange(told.num_rows), length // max(told.num_rows, 1)
            if sized:
                found = [size_of(data or b"") or (0, 0) for data in _pictures(file, group, image).to_pylist()]
                part["height"], part["width"] = clipped(found)
            rows.append(part)
            digest = hashlib.blake2b(f"{shard}/{group}".encode(), digest_size=8).digest()
            keys.append(np.full(told.num_rows, np.frombuffer(digest, np.uint64)[0]))
        empty = np.zeros(0, ROW), np.zeros(0, np.uint64)  # a file without row groups
        every, key = np.concatenate([empty[0], *rows]), np.concatenate([empty[1], *keys])
        captioned = np.array([bool(captions) for captions in said], bool)
        kept = captioned & (every["height"] > 0) if sized else captioned
        problems = left_out(len(every), int(captioned.sum()), int(kept.sum()))
        return Scan(every[kept], [captions for captions, keep in zip(said, kept, strict=True) if keep], key[kept], problems)

    return _guarded(read)


def _open(url: str, size: int, footer: Any = None) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(_Ranged(url, size), metadata=footer, pre_buffer=True)


def _pictures(file: Any, group: int, name: str) -> Any:
    """The encoded pictures of a row group, a pyarrow array of binaries."""
    import pyarrow as pa

    column = file.read_row_group(group, columns=[name], use_threads=False).column(0).combine_chunks()
    # Flattened: a picture that is null is so in its bytes, too.
    return column.flatten()[column.type.get_field_index("bytes")] if pa.types.is_struct(column.type) else column


def _guarded(read: Callable[[], T]) -> T:
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise Lost(f"cannot be read as parquet ({first_line(error)[:200]})") from error


def _columns(schema: Any, field: str | None, captioned: bool = True) -> tuple[str, str]:
    """(the column of pictures, that of captions)."""
    import pyarrow as pa

    def binary(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(child.name == "bytes" and binary(child.type) for child in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def text(kind: Any) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return text(kind.value_type)
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    pictures = [name for name in PICTURES if name in schema.names and binary(schema.field(name).type)]
    pictures += [column.name for column in schema if binary(column.type)]
    wanted = (field,) if field else CAPTIONS
    captions = [name for name in wanted if name in schema.names and text(schema.field(name).type)]
    if not pictures or (captioned and not captions):
        missing = "of captions" if pictures else "of encoded pictures"
        raise Lost(f"no column {missing} among {', '.join(schema.names)} (data.caption_field names another one for captions)")
    return pictures[0], captions[0] if captioned else ""


def _clean(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [line for text in values if isinstance(text, str) and (line := " ".join(text.split()))]


FORMAT = Format("parquet", ".parquet", ROW, scan, ParquetRecords)
