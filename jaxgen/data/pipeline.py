"""From prepared records to batches on the devices.

Which picture, caption and augmentation a place in a batch gets is a function of (seed, step, place in the global batch)
alone; a process takes its slice after that is decided. So the step number is the whole state of the input, and another
number of processes sees the same batches."""

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, Full, Queue
from typing import Any

import jax
import numpy as np

from jaxgen.data import buckets, registry
from jaxgen.data.config import DataConfig
from jaxgen.data.recipe import decode, fit
from jaxgen.data.rewrite import Rewritings, rewritings
from jaxgen.data.shards import Records, concurrently
from jaxgen.errors import UserError

FOREVER = 2**40  # positions; no run is that long


class Source:
    """A split's decoded pictures and captions by index. shapes: those that a batch can have; by default the square."""

    size = stored = 1
    flip = crop = False
    shards: Records | None = None
    threads = 1
    bucket: np.ndarray | None = None
    # In the pictures' place (precompute.py): rows [N, 1 or 2 (mirrored), ...].
    made: dict[str, np.ndarray] | None = None
    rewritings: Rewritings | None = None
    _kept: list[tuple[np.ndarray, list[str]] | None] | None = None  # what `self[index]` gave, where memory holds all of it
    _captions: list[list[str]] | None = None

    def __init__(
        self,
        config: DataConfig,
        records: Any,
        *,
        flip: bool = False,
        crop: bool = False,
        shapes: Sequence[buckets.Size] | None = None,
    ):
        self.records, self.flip, self.crop = records, flip, crop
        # Room for a random crop: an eighth more than what a batch shows.
        self.size = config.image_size
        self.stored = config.image_size * 9 // 8 if crop else config.image_size
        self.shapes = shapes or [(self.size, self.size)]
        if len(self.shapes) > 1:  # of each picture its shape among these
            self.bucket = buckets.nearest(records.sizes, self.shapes).astype(np.uint8)
        self.max_bad, self.bad = config.max_bad, 0
        shards = records if isinstance(records, Records) else None
        self.shards, self.threads = shards, config.threads or (4 if shards is None else shards.threads)
        # What stands in for a picture that cannot be read: the next one; of a set in shards one of another shard, as a lost
        # shard's pictures would else all become the same.
        self.stride = 1 if shards is None else _coprime(int(0.618 * len(shards)), len(shards))
        if len(records) * self.stored**2 * 3 <= config.keep_in_memory * 2**20:
            self._kept = [None] * len(records)
            if shards is None:  # pictures are decoded when they first come: a run's first step waits for none of them
                self._captions = records.captions()
            else:
                self._load()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[str]]:
        """(uint8 [H, W, 3], captions); a picture that cannot be read is replaced by the next that can."""
        if self._kept is None:
            return self._read(index)
        pair = self._kept[index]
        if pair is None:
            pair = self._kept[index] = self._read(index)
        return pair

    def _read(self, index: int) -> tuple[np.ndarray, list[str]]:
        for step in range(len(self)):
            data, captions, _ = self.records[(index + step * self.stride) % len(self)]
            if data is None:  # of a lost shard: counted there
                continue
            image = decode(data)
            if image is not None:
                height, width = self.shape_of(index)
                return fit(image, height * self.stored // self.size, width * self.stored // self.size), captions
            self.bad += 1
            if self.bad > self.max_bad:
                break
        raise UserError(f"{self.bad} unreadable pictures met while training, more than data.max_bad={self.max_bad}")

    def shape_of(self, index: int) -> buckets.Size:
        """(height, width) in which a batch shows this picture."""
        return (self.size, self.size) if self.bucket is None else self.shapes[self.bucket[index]]

    def order(self, seed: int, batch_size: int) -> Any:
        """order[position]: the index at that place of all batches one after the other."""
        import grain

        members = None
        if self.bucket is not None:
            every = [np.flatnonzero(self.bucket == k).astype(np.int32) for k in range(len(self.shapes))]
            members = [some for some in every if len(some)]
        orders = self.shards.orders(seed, batch_size, members) if self.shards is not None else None
        if orders is None:
            counts = [len(self)] if members is None else [len(some) for some in members]
            orders = [grain.MapDataset.range(count).seed(seed).shuffle().repeat(None) for count in counts]
        return orders[0] if members is None else buckets.BucketOrder(members, orders, batch_size)

    def captions_of(self, index: int) -> list[str]:
        if self._captions is not None:
            return self._captions[index]
        return self.shards.captions_of(index) if self.shards is not None else self.records[index][1]

    def captions(self) -> Iterator[str]:
        """Every caption of the split, and every variant of it."""
        for index in range(len(self)):
            for caption in self.captions_of(index):
                yield caption
                yield from self.rewritings.variants[caption] if self.rewritings is not None else ()

    @property
    def changing(self) -> str:
        """Why nothing can be made of each picture once for all, if so."""
        if self.crop:
            return "are cropped at random, anew at each visit"
        return "" if self.bucket is None else "have several shapes (data.max_aspect_ratio)"

    @property
    def in_memory(self) -> bool:
        return self._kept is not None or self.made is not None

    def _load(self) -> None:
        """All pictures, several at a time: shards may lie far away."""
        several = [range(start, min(start + 64, len(self))) for start in range(0, len(self), 64)]
        for _ in concurrently(lambda some: [self[index] for index in some], several, self.threads):
            pass


def _coprime(start: int, to: int) -> int:
    return next(k for k in range(max(start, 1), start + to + 2) if math.gcd(k, to) == 1)


def load_source(config: DataConfig, split: str = "train", shapes: Sequence[buckets.Size] | None = None) -> Source:
    """A split of the configured set, prepared first where that is needed, its pictures in the nearest of `shapes`, by default
    the square. Only training pictures are augmented, and only their captions rewritten."""
    _, recipe = registry.recipe(config)
    records = registry.records(config, split)
    if len(records) == 0:
        raise UserError(f"data.name={config.name}: its split {split!r} is empty")
    train = split == "train"
    flip = recipe.flip if config.flip is None else config.flip
    crop = recipe.crop if config.crop is None else config.crop
    source = Source(config, records, flip=train and flip, crop=train and crop, shapes=shapes)
    if train and config.rewrite.source:
        source.rewritings = rewritings(config, source.captions())
    return source


def batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    caption_dropout: float = 0.0,
    threads: int | None = None,
) -> Iterator[dict[str, Any]]:
    """This process's share of every global batch from `start_step` on, without end:
    {"image": uint8 [b, H, W, 3] (or the rows of source.made), "caption": list of b strings, "" where it is dropped}. H and W
    are one of source.shapes, alike over the global batch."""
    import grain

    share = batch_size // process_count
    order = source.order(seed, batch_size)
    soon = getattr(order, "ahead", 0) * batch_size
    threads = threads or source.threads

    def fetch(k: int) -> dict[str, Any]:
        step, place = divmod(k, share)
        position = (start_step + step) * batch_size + process_index * share + place
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
        if soon and place == 0 and source.shards is not None and not source.in_memory:
            source.shards.expect(np.array([order[position + soon + p] for p in range(share)]))
        entry: Any = order[position]
        index, made = int(entry), source.made
        image, captions = source[index] if made is None else (np.empty(0), source.captions_of(index))
        caption = captions[int(rng.integers(len(captions)))]
        dropped = rng.random() < caption_dropout
        height, width = source.shape_of(index)
        margin = np.array([height, width]) * source.stored // source.size - (height, width)
        top, left = (rng.random(2) * (margin + 1)).astype(int)
        mirrored = rng.random() < 0.5 and source.flip
        if source.rewritings is not None:  # the last draws: without them all others stay what they were
            caption = source.rewritings.draw(caption, rng)
        if made is not None:
            return {name: rows[index, int(mirrored)] for name, rows in made.items()} | {"caption": "" if dropped else caption}
        image = image[top : top + height, left : left + width]
        if mirrored:
            image = image[:, ::-1]
        return {"image": image, "caption": "" if dropped else caption}

    # A task of several pictures, as one costs a thread pool a quarter of what decoding a picture does.
    several = share if source.in_memory else min(share, 4)
    ahead = 0 if source.in_memory else max(2 * share // several, threads)
    options = grain.ReadOptions(num_threads=0 if source.in_memory else threads, prefetch_buffer_size=ahead)
    tasks = grain.MapDataset.range(FOREVER).map(lambda k: [fetch(int(k) * several + i) for i in range(several)])
    examples = itertools.chain.from_iterable(tasks.to_iter_dataset(options))
    while True:
        batch = list(itertools.islice(examples, share))
        yield {name: [e[name] for e in batch] if name == "caption" else np.stack([e[name] for e in batch]) for name in batch[0]}


def to_device(
    batches: Iterator[dict[str, Any]], sharding: jax.sharding.NamedSharding, ready: Callable[[Any], Any], ahead: int = 2
) -> Iterator[Any]:
    """Global jax.Arrays of `ready(batch)` (a tree of this process's arrays), `ahead` batches before they are needed.

    An error in the input is raised where the batch would have come."""
    queue: Queue[Any] = Queue(ahead)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                if stop.is_set():
                    return
                arrays = jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), ready(batch))
                put(arrays)
        except BaseException as error:  # handed to the consumer
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="input")
    thread.start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            try:
                queue.get_nowait()
            except Empty:
                thread.join(0.05)
