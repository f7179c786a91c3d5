"""Captions encoded once, beside the steps, where the encoder would cost more than a step (a CPU)."""

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxgen.errors import UserError
from jaxgen.storage import Path, write_arrays
from jaxgen.text.encoder import TextEncoder
from jaxgen.text.features import TextFeatures

GROUP = 16  # captions encoded together: more are no faster, and a batch waits for a group for each of its captions
FILE = "features.npy"
KEEP_EVERY = 30.0  # seconds
SHARE = 0.5  # of the host's memory that a table may take


class Rows(NamedTuple):
    """Captions and their features: hidden [N, T, D], pooled float32 [N, D], lengths int32 [N]."""

    captions: list[str]
    hidden: np.ndarray
    pooled: np.ndarray
    lengths: np.ndarray


class CaptionTable:
    """Features of a fixed set of captions, the empty one included; float16 in memory where that holds them (the states of
    some language models are too large for it), float32 on the way out.

    A caption is encoded when it is first asked for, so that a run's first step waits for few; with it others of like length,
    so that little of the work is padding, and always the same ones, so that a run that goes on sees the same bits. They are
    kept under `path`, each encoder's by themselves: now and then, and when all are there, what is new in a file of its own.
    So none of several runs loses what another one wrote, and each takes what it finds at its start, caption by caption.
    Several threads may use it. All processes of a run make it together, and then each encodes what it meets.

    Raises UserError, before anything is encoded, where the table would not fit into memory."""

    def __init__(self, encoder: TextEncoder, captions: Iterable[str], path: Path | None = None):
        self._path, self._lock = path and path / encoder.fingerprint[:16], threading.Lock()
        self._encode, batch = _over_local_devices(encoder)
        unique = sorted({*captions, ""})
        tokens = encoder.count(unique)
        longest = int(tokens.max())
        width = _states(encoder, longest)
        check_size(len(unique), width, encoder.hidden_size, host_memory())
        self._rows = Rows(
            unique,
            np.zeros((len(unique), width, encoder.hidden_size), np.float16),
            np.zeros((len(unique), encoder.pooled_size), np.float32),
            np.zeros(len(unique), np.int32),
        )
        self._index = {caption: i for i, caption in enumerate(unique)}
        new = np.flatnonzero(~self._take())
        order = new[np.argsort(-tokens[new], kind="stable")]
        self._groups: list[tuple[np.ndarray, int]] = []  # rows that are encoded together, and the tokens they are padded to
        self._group = np.full(len(unique), -1)  # where a row is that is not encoded yet
        for begin in range(0, len(order), batch):
            rows = order[begin : begin + batch]
            self._group[rows] = len(self._groups)
            # Multiples of 4: a program more costs a second.
            self._groups.append((rows, min(-(-int(tokens[rows[0]]) // 4) * 4, longest)))
        self._left, self._told = len(new), time.monotonic()
        self._keep = self._told + KEEP_EVERY
        self._unkept: list[np.ndarray] = []  # rows of whole groups

    def lookup(self, captions: Sequence[str]) -> TextFeatures:
        """float32 features of captions of the table, T the same for every call. KeyError for an unknown caption."""
        rows = np.array([self._index[caption] for caption in captions])
        with self._lock:
            for group in np.unique(self._group[rows]):
                if group >= 0:
                    self._fill(*self._groups[group])
            _, hidden, pooled, lengths = self._rows
            mask = np.arange(hidden.shape[1]) < lengths[rows, None]
            return TextFeatures(hidden[rows].astype(np.float32), pooled[rows].astype(np.float32), mask)  # ty: ignore[invalid-argument-type]

    def _take(self) -> np.ndarray:
        """Fills in what is kept; bool [N]: the rows that are there."""
        there = np.zeros(len(self._index), bool)
        # What was written first counts, so that a run that goes on sees its own.
        for file in sorted(self._path.glob("*.npy")) if self._path is not None else ():
            kept = _read(file)
            if kept is None:
                continue
            if kept.hidden.dtype == np.float32:  # small states too were seen unrounded from there on
                self._widen()
            theirs = np.array([i for i, c in enumerate(kept.captions) if c in self._index and not there[self._index[c]]], int)
            rows = np.array([self._index[kept.captions[i]] for i in theirs], int)
            self._put(rows, kept.hidden[theirs], kept.pooled[theirs], kept.lengths[theirs])
            there[rows] = True
        return there

    def _put(self, rows: np.ndarray, states: np.ndarray, pooled: np.ndarray, lengths: np.ndarray) -> None:
        states = states[:, : self._rows.hidden.shape[1]]  # of a file in which longer captions are
        if np.abs(states).max(initial=0) > np.finfo(np.float16).max:
            self._widen()
        self._rows.hidden[rows, : states.shape[1]] = states
        self._rows.pooled[rows], self._rows.lengths[rows] = pooled, lengths

    def _widen(self) -> None:
        self._rows = self._rows._replace(hidden=self._rows.hidden.astype(np.float32, copy=False))

    def _fill(self, rows: np.ndarray, length: int) -> None:
        captions = self._rows.captions
        text = self._encode([captions[i] for i in rows], length)
        mask = np.asarray(text.mask)
        self._put(rows, np.asarray(text.hidden) * mask[..., None], np.asarray(text.pooled), mask.sum(1))
        self._group[rows] = -1
        self._unkept.append(rows)
        self._left -= len(rows)
        if time.monotonic() - self._told > 5:
            self._told = time.monotonic()
            _tell(f"encoding captions as they come: {len(captions) - self._left} of {len(captions)}")
        if (not self._left or time.monotonic() > self._keep) and self._path is not None and jax.process_index() == 0:
            try:
                self._write(self._path)
            except UserError as error:  # they can be made again
                _tell(f"warning: encoded captions are not kept: {error}")
            self._keep = time.monotonic() + KEEP_EVERY

    def _write(self, path: Path) -> None:
        """What is not kept yet, in one file, so that a kill leaves it whole or none of it."""
        rows = np.concatenate(self._unkept)
        captions, hidden, pooled, lengths = self._rows
        name = f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.npy"  # in their order in time
        parts = hidden[rows, : lengths[rows].max()], pooled[rows], lengths[rows]
        write_arrays(path / name, np.frombuffer(json.dumps([captions[i] for i in rows]).encode(), np.uint8), *parts)
        self._unkept.clear()


def check_size(captions: int, tokens: int, width: int, memory: int) -> None:
    """Raises UserError where a table of float16 would take more than its share of `memory` bytes."""
    size = captions * tokens * width * 2
    if size > SHARE * memory:
        raise UserError(
            f"a table of {captions:,} captions x {tokens} tokens x {width} features would take {in_words(size)}, more than "
            f"{SHARE:.0%} of this host's {in_words(memory)}: encode inside the step, with --config.text.in_step=True"
        )


def _over_local_devices(encoder: TextEncoder) -> tuple[Callable[[Sequence[str], int], TextFeatures], int]:
    """(captions, tokens they are padded to) -> their features in NumPy, and how many captions it takes at most."""
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = encoder.params
    if jax.process_count() > 1:  # each has its own slices, and encodes by itself
        from jax.experimental import multihost_utils

        params = multihost_utils.process_allgather(params, tiled=True)
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    apply = jax.jit(encoder.apply)
    batch = -(-GROUP // len(devices)) * len(devices)

    def encode(captions: Sequence[str], length: int) -> TextFeatures:
        ids = encoder.tokenize([*captions, *[""] * (batch - len(captions))], length)
        features = apply(params, *(jax.device_put(ids[k], split) for k in ("input_ids", "attention_mask")))
        return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(captions)], features)

    return encode, batch


def _states(encoder: TextEncoder, tokens: int) -> int:
    """How many states the encoder gives for so many tokens: it may cut some off, or consist of two."""
    ids = encoder.tokenize([""], tokens)
    return jax.eval_shape(encoder.apply, encoder.params, ids["input_ids"], ids["attention_mask"]).hidden.shape[1]


def _read(path: Path) -> Rows | None:
    """A file's rows; None where it is not whole."""
    try:
        with path.open("rb") as file:
            rows = Rows(json.loads(np.load(file).tobytes()), np.load(file), np.load(file), np.load(file))
        return rows if {len(part) for part in rows} == {len(rows.captions)} else None
    except (OSError, ValueError, EOFError):
        return None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def host_memory() -> int:
    """Bytes of the host's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def in_words(count: float) -> str:
    """A number of bytes, short."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
