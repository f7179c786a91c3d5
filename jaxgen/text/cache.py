"""Captions encoded once, ahead of training, where the encoder would cost more than the step (a CPU)."""

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxgen.storage import Path, write_bytes, write_json
from jaxgen.text.encoder import TextEncoder
from jaxgen.text.features import TextFeatures

BATCH = 128


class CaptionTable:
    """Features of a fixed set of captions, the empty one included; float16 in memory, float32 on the way out."""

    def __init__(self, captions: Sequence[str], hidden: np.ndarray, pooled: np.ndarray, lengths: np.ndarray):
        self.index = {caption: i for i, caption in enumerate(captions)}
        self.hidden, self.pooled, self.lengths = hidden, pooled, lengths

    def lookup(self, captions: Sequence[str]) -> TextFeatures:
        """float32 features of captions of the table, T the same for every call. KeyError for an unknown caption."""
        rows = np.array([self.index[caption] for caption in captions])
        mask = np.arange(self.hidden.shape[1]) < self.lengths[rows, None]
        return TextFeatures(self.hidden[rows].astype(np.float32), self.pooled[rows].astype(np.float32), mask)  # ty: ignore[invalid-argument-type]


def encode_captions(encoder: TextEncoder, captions: Iterable[str], path: Path | None = None) -> CaptionTable:
    """A table of all distinct captions; kept under `path`, and read from there when encoder and captions are the same."""
    unique = sorted({*captions, ""})
    key = hashlib.sha256(json.dumps([encoder.fingerprint, unique]).encode()).hexdigest()
    if path is not None and (kept := _read(path, key, unique)) is not None:
        return kept
    table = _encode(encoder, unique)
    if path is not None:
        for name, value in (("hidden", table.hidden), ("pooled", table.pooled), ("lengths", table.lengths)):
            write_bytes(path / f"{name}.npy", _npy(value))
        write_json(path / "key.json", {"key": key, "captions": len(unique)})  # last: without it the rest does not count
    return table


def _encode(encoder: TextEncoder, captions: Sequence[str]) -> CaptionTable:
    """Captions of like length together, over all local devices, so that little of the work is padding."""
    ids = encoder.tokenizer.encode(captions, encoder.max_length)
    lengths = np.array([len(row) for row in ids], np.int32)
    # Multiples of 4: short captions differ by a few tokens, and a program more costs a second.
    steps = sorted({int(min(-(-n // 4) * 4, encoder.max_length)) for n in lengths})
    hidden = np.zeros((len(captions), int(lengths.max()), encoder.hidden_size), np.float16)
    pooled = np.zeros((len(captions), encoder.pooled_size), np.float16)
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(encoder.params, whole)
    apply = jax.jit(encoder.apply)
    batch = -(-BATCH // len(devices)) * len(devices)
    began = told = time.monotonic()
    done = 0
    for shorter, step in zip([0, *steps], steps, strict=False):
        rows = np.flatnonzero((lengths > shorter) & (lengths <= step))
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            tokens = encoder.tokenize([captions[i] for i in some] + [""] * (batch - len(some)), length=step)
            features = apply(params, *(jax.device_put(tokens[k], split) for k in ("input_ids", "attention_mask")))
            keep = min(step, hidden.shape[1])
            hidden[some, :keep] = np.asarray(features.hidden)[: len(some), :keep]
            pooled[some] = np.asarray(features.pooled)[: len(some)]
            done += len(some)
            if time.monotonic() - told > 5:
                told = time.monotonic()
                left = (told - began) / done * (len(captions) - done)
                print(f"encoding captions: {done} of {len(captions)}, {left:.0f} s left", file=sys.stderr, flush=True)
    return CaptionTable(captions, hidden, pooled, lengths)


def _read(path: Path, key: str, captions: Sequence[str]) -> CaptionTable | None:
    try:
        if json.loads((path / "key.json").read_text())["key"] != key:
            return None
        with (
            (path / "hidden.npy").open("rb") as a,
            (path / "pooled.npy").open("rb") as b,
            (path / "lengths.npy").open("rb") as c,
        ):
            return CaptionTable(captions, np.load(a), np.load(b), np.load(c))
    except (OSError, ValueError, KeyError):
        return None


def _npy(value: np.ndarray) -> bytes:
    import io

    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()
