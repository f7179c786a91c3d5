"""Captions encoded once, ahead of training, where the encoder would cost more than the step (a CPU)."""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxgen.errors import UserError
from jaxgen.storage import Path, write_array, write_json
from jaxgen.text.encoder import TextEncoder
from jaxgen.text.features import TextFeatures

BATCH = 64
SHARE = 0.5  # of the host's memory that a table may take


class CaptionTable:
    """Features of a fixed set of captions, the empty one included; float16 in memory where that holds them (the states of
    some language models are too large for it), float32 on the way out."""

    def __init__(self, captions: Sequence[str], hidden: np.ndarray, pooled: np.ndarray, lengths: np.ndarray):
        self.index = {caption: i for i, caption in enumerate(captions)}
        self.hidden, self.pooled, self.lengths = hidden, pooled, lengths

    def lookup(self, captions: Sequence[str]) -> TextFeatures:
        """float32 features of captions of the table, T the same for every call. KeyError for an unknown caption."""
        rows = np.array([self.index[caption] for caption in captions])
        mask = np.arange(self.hidden.shape[1]) < self.lengths[rows, None]
        return TextFeatures(self.hidden[rows].astype(np.float32), self.pooled[rows].astype(np.float32), mask)  # ty: ignore[invalid-argument-type]


def encode_captions(encoder: TextEncoder, captions: Iterable[str], path: Path | None = None) -> CaptionTable:
    """A table of all distinct captions.

    It is kept under `path`, with the encoder's fingerprint: what is there by the same encoder is taken from there, caption by
    caption, and what another one wrote is not used. Raises UserError, before anything is encoded, where the table would not
    fit into memory."""
    unique = sorted({*captions, ""})
    kept = _read(path, encoder.fingerprint) if path is not None else None
    new = [caption for caption in unique if kept is None or caption not in kept.index]
    if kept is not None and not new and len(kept.index) == len(unique):
        return kept
    tokens = encoder.count(new)
    check_size(len(unique), int(tokens.max(initial=1)), encoder.hidden_size, host_memory())
    table = _encode(encoder, new, tokens) if kept is None else _joined(unique, kept, _encode(encoder, new, tokens))
    if path is not None and jax.process_index() == 0:
        for name, value in (("hidden", table.hidden), ("pooled", table.pooled), ("lengths", table.lengths)):
            write_array(path / f"{name}.npy", value)
        # Last: without it the rest does not count.
        write_json(path / "key.json", {"fingerprint": encoder.fingerprint, "captions": list(table.index)})
    return table


def check_size(captions: int, tokens: int, width: int, memory: int) -> None:
    """Raises UserError where a table of float16 would take more than its share of `memory` bytes."""
    size = captions * tokens * width * 2
    if size > SHARE * memory:
        raise UserError(
            f"a table of {captions:,} captions x {tokens} tokens x {width} features would take {in_words(size)}, more than "
            f"{SHARE:.0%} of this host's {in_words(memory)}: encode inside the step, with --config.text.in_step=True"
        )


def _encode(encoder: TextEncoder, captions: Sequence[str], tokens: np.ndarray) -> CaptionTable:
    """Captions of like length together, over all local devices, so that little of the work is padding."""
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = encoder.params
    if jax.process_count() > 1:  # each has its own slices, and encodes by itself
        from jax.experimental import multihost_utils

        params = multihost_utils.process_allgather(params, tiled=True)
    params = jax.device_put(params, whole)
    apply = jax.jit(encoder.apply)
    batch = -(-BATCH // len(devices)) * len(devices)
    hidden = np.zeros((len(captions), 0, encoder.hidden_size), np.float16)
    pooled = np.zeros((len(captions), encoder.pooled_size), np.float32)
    lengths = np.zeros(len(captions), np.int32)
    began = told = time.monotonic()
    done = 0
    order = np.argsort(-tokens, kind="stable")  # the longest first: it sets the width
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        # Multiples of 4: a program more costs a second.
        length = int(min(-(-tokens[some[0]] // 4) * 4, encoder.lengths[-1]))
        ids = encoder.tokenize([captions[i] for i in some] + [""] * (batch - len(some)), length)
        features = apply(params, *(jax.device_put(ids[k], split) for k in ("input_ids", "attention_mask")))
        states, mask = np.asarray(features.hidden)[: len(some)], np.asarray(features.mask)[: len(some)]
        if not hidden.shape[1]:
            hidden = np.zeros((len(captions), states.shape[1], encoder.hidden_size), np.float16)
        if hidden.dtype == np.float16 and np.abs(states).max(initial=0) > np.finfo(np.float16).max:
            hidden = hidden.astype(np.float32)
        hidden[some, : states.shape[1]] = states
        pooled[some] = np.asarray(features.pooled)[: len(some)]
        lengths[some] = mask.sum(1)
        done += len(some)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            left = (told - began) / done * (len(captions) - done)
            print(f"encoding captions: {done} of {len(captions)}, {left:.0f} s left", file=sys.stderr, flush=True)
    return CaptionTable(captions, hidden[:, : lengths.max(initial=1)], pooled, lengths)


def _joined(captions: Sequence[str], *tables: CaptionTable) -> CaptionTable:
    """The rows of `captions`, each from the table that has it."""
    width = max(table.hidden.shape[1] for table in tables)
    dtype = np.result_type(*(table.hidden for table in tables))
    hidden = np.zeros((len(captions), width, tables[0].hidden.shape[2]), dtype)
    pooled = np.zeros((len(captions), tables[0].pooled.shape[1]), np.float32)
    lengths = np.zeros(len(captions), np.int32)
    for table in tables:
        here = [(i, table.index[caption]) for i, caption in enumerate(captions) if caption in table.index]
        ours, theirs = np.array(here, int).reshape(-1, 2).T
        hidden[ours, : table.hidden.shape[1]] = table.hidden[theirs]
        pooled[ours], lengths[ours] = table.pooled[theirs], table.lengths[theirs]
    return CaptionTable(captions, hidden, pooled, lengths)


def _read(path: Path, fingerprint: str) -> CaptionTable | None:
    try:
        key = json.loads((path / "key.json").read_text())
        if key["fingerprint"] != fingerprint:
            return None
        arrays = []
        for name in ("hidden", "pooled", "lengths"):
            with (path / f"{name}.npy").open("rb") as file:
                arrays.append(np.load(file))
        if {len(array) for array in arrays} != {len(key["captions"])}:
            return None
        return CaptionTable(key["captions"], *arrays)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


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
