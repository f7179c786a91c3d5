"""Captions encoded once, beside the steps, where the encoder would cost more than a step (a CPU)."""

import json
import os
import sys
import threading
import time
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
    """Captions and their features as they lie on disk: hidden [N, T, D], pooled float32 [N, D], lengths int32 [N]. T is the
    states of `longest` tokens."""

    captions: list[str]
    hidden: np.ndarray
    pooled: np.ndarray
    lengths: np.ndarray
    longest: int


class CaptionTable:
    """Features of a fixed set of captions, the empty one included; float16 in memory where that holds them (the states of
    some language models are too large for it), float32 on the way out.

    A caption is encoded when it is first asked for, so that a run's first step waits for few; with it others of like length,
    so that little of the work is padding, and always the same ones, so that a run that goes on sees the same bits. They are
    kept under `path`, with the encoder's fingerprint, now and then and when all are there: what is there by the same encoder
    is taken from there, caption by caption, and what another one wrote is not used. Several threads may use it. All processes
    of a run make it together, and then each encodes what it meets.

    Raises UserError, before anything is encoded, where the table would not fit into memory."""

    def __init__(self, encoder: TextEncoder, captions: Iterable[str], path: Path | None = None):
        self._path, self._fingerprint, self._lock = path, encoder.fingerprint, threading.Lock()
        self._encode, batch = _over_local_devices(encoder)
        unique = sorted({*captions, ""})
        kept = _read(path, encoder.fingerprint) if path is not None else None
        known = set(kept.captions) if kept is not None else set()
        new = np.array([i for i, caption in enumerate(unique) if caption not in known], int)
        self._groups: list[tuple[np.ndarray, int]] = []  # rows that are encoded together, and the tokens they are padded to
        if kept is not None and not len(new):
            self._rows = kept
        else:
            tokens = encoder.count([unique[i] for i in new])
            longest = max(int(tokens.max()), kept.longest if kept is not None else 0)
            width = _states(encoder, longest)
            check_size(len(unique), width, encoder.hidden_size, host_memory())
            self._rows = _room(unique, width, longest, encoder, kept)
            order = np.argsort(-tokens, kind="stable")
            for some in np.split(order, range(batch, len(order), batch)):
                # Multiples of 4: a program more costs a second.
                self._groups.append((new[some], min(-(-int(tokens[some[0]]) // 4) * 4, longest)))
        self._index = {caption: i for i, caption in enumerate(self._rows.captions)}
        self._group = np.full(len(self._index), -1)  # where a row is that is not encoded yet
        for i, (rows, _) in enumerate(self._groups):
            self._group[rows] = i
        self._left, self._told = len(new), time.monotonic()
        self._keep = self._told + KEEP_EVERY

    def lookup(self, captions: Sequence[str]) -> TextFeatures:
        """float32 features of captions of the table, T the same for every call. KeyError for an unknown caption."""
        rows = np.array([self._index[caption] for caption in captions])
        with self._lock:
            for group in np.unique(self._group[rows]):
                if group >= 0:
                    self._fill(*self._groups[group])
            hidden, pooled, lengths = self._rows[1:4]
            mask = np.arange(hidden.shape[1]) < lengths[rows, None]
            return TextFeatures(hidden[rows].astype(np.float32), pooled[rows].astype(np.float32), mask)  # ty: ignore[invalid-argument-type]

    def _fill(self, rows: np.ndarray, length: int) -> None:
        captions, hidden, pooled, lengths, _ = self._rows
        text = self._encode([captions[i] for i in rows], length)
        states, pooled[rows], lengths[rows] = text.hidden, text.pooled, text.mask.sum(1)
        if hidden.dtype == np.float16 and np.abs(states).max(initial=0) > np.finfo(np.float16).max:
            hidden = hidden.astype(np.float32)
            self._rows = self._rows._replace(hidden=hidden)
        hidden[rows, : states.shape[1]] = states
        self._group[rows] = -1
        self._left -= len(rows)
        if time.monotonic() - self._told > 5:
            self._told = time.monotonic()
            _tell(f"encoding captions as they come: {len(captions) - self._left} of {len(captions)}")
        if (not self._left or time.monotonic() > self._keep) and self._path is not None and jax.process_index() == 0:
            began = time.monotonic()
            try:
                _write(self._path, self._fingerprint, self._encoded())
            except UserError as error:  # they can be made again
                _tell(f"warning: encoded captions are not kept: {error}")
            self._keep = time.monotonic() + max(KEEP_EVERY, 20 * (time.monotonic() - began))

    def _encoded(self) -> Rows:
        """The rows that are there, whole groups of them."""
        if not self._left:
            return self._rows
        there = np.flatnonzero(self._group < 0)
        captions, hidden, pooled, lengths, longest = self._rows
        return Rows([captions[i] for i in there], hidden[there], pooled[there], lengths[there], longest)


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


def _room(captions: list[str], width: int, longest: int, encoder: TextEncoder, kept: Rows | None) -> Rows:
    """A table of captions, filled as far as they are among those kept."""
    room = Rows(
        captions,
        np.zeros((len(captions), width, encoder.hidden_size), np.float16 if kept is None else kept.hidden.dtype),
        np.zeros((len(captions), encoder.pooled_size), np.float32),
        np.zeros(len(captions), np.int32),
        longest,
    )
    if kept is not None:
        place = {caption: i for i, caption in enumerate(kept.captions)}
        ours, theirs = np.array([(i, place[c]) for i, c in enumerate(captions) if c in place], int).reshape(-1, 2).T
        room.hidden[ours, : kept.hidden.shape[1]] = kept.hidden[theirs]
        room.pooled[ours], room.lengths[ours] = kept.pooled[theirs], kept.lengths[theirs]
    return room


def _write(path: Path, fingerprint: str, rows: Rows) -> None:
    """In one file, so that a kill leaves the last one whole."""
    key = json.dumps({"fingerprint": fingerprint, "captions": rows.captions, "longest": rows.longest})
    write_arrays(path / FILE, np.frombuffer(key.encode(), np.uint8), rows.hidden, rows.pooled, rows.lengths)


def _read(path: Path, fingerprint: str) -> Rows | None:
    try:
        with (path / FILE).open("rb") as file:
            key = json.loads(np.load(file).tobytes())
            if key["fingerprint"] != fingerprint:
                return None
            rows = Rows(key["captions"], np.load(file), np.load(file), np.load(file), key["longest"])
        return rows if {len(part) for part in rows[1:4]} == {len(rows.captions)} else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
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
