"""What a family makes of each picture (latents, tokens), once, ahead of training, where that costs more than the step (a CPU).

Rows lie beside the data set, in a directory whose name is a digest of all they hang on: the set and split, resolution,
mirroring, and the codec's configuration and weights."""

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.data import registry
from jaxgen.data.config import DataConfig
from jaxgen.data.pipeline import Source
from jaxgen.errors import UserError
from jaxgen.storage import Path, as_path, is_remote, write_arrays, write_json
from jaxgen.text.cache import SHARE, host_memory, in_words

BATCH = 64
VERSION = 1
MEND = "make them inside the step, with --config.data.precompute=False"

Make = Callable[[Any, Any], dict[str, jax.Array]]  # params, uint8 [B, H, W, 3] -> arrays [B, ...]; traced


def precompute(
    config: DataConfig,
    source: Source,
    make: Make,
    params: Any,
    key: Mapping[str, Any],
    *,
    split: str = "train",
    dtype: Any = np.float16,
) -> dict[str, np.ndarray] | None:
    """{name: rows [N, 1 or 2, ...]} of every picture of `source`, as it is and, where the set allows it, mirrored.

    Floats are kept in `dtype`, in float32 where that would overflow. key: what rows hang on besides the pictures. None where
    `make` makes nothing. Raises UserError where pictures are cropped at random or cannot be read, and, before anything is
    made, where the rows would not fit into memory or onto the disk."""
    picture = jax.ShapeDtypeStruct((1, source.size, source.size, 3), np.uint8)
    shapes = jax.eval_shape(make, params, picture)
    if not shapes:
        return None
    if source.changing:
        raise UserError(f"data.precompute: pictures of {config.name} {source.changing}: {MEND}")
    directory = as_path(config.dir) / "latents" / digest(config, source, key, split, dtype)
    kept = _read(directory, shapes, len(source))
    if kept is not None:
        return kept
    sides = 2 if source.flip else 1
    size = sum(np.prod(s.shape) * _kept_as(s.dtype, dtype).itemsize for s in shapes.values()) * sides * len(source)
    check_size(int(size), directory)
    rows = _make(source, make, params, shapes, sides, dtype)
    if source.bad:
        raise UserError(f"data.precompute: {source.bad} pictures of {config.name} cannot be read: mend the set, or {MEND}")
    if jax.process_index() == 0:
        for name, value in rows.items():
            write_arrays(directory / f"{name}.npy", value)
        write_json(directory / "key.json", dict(key))  # last: without it the rest does not count
    return rows


def digest(config: DataConfig, source: Source, key: Mapping[str, Any], split: str, dtype: Any) -> str:
    """The name of the rows' directory."""
    name, recipe = registry.recipe(config)
    parts = [VERSION, name, recipe.identity(), split, len(source), source.size, source.flip, np.dtype(dtype).name, dict(key)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_size(size: int, directory: Path) -> None:
    """Raises UserError where rows of `size` bytes would take more than their share of memory, or than the disk has left."""
    memory = host_memory()
    if size > SHARE * memory:
        raise UserError(
            f"data.precompute: rows for all pictures would take {in_words(size)}, more than {SHARE:.0%} of this host's "
            f"{in_words(memory)}: {MEND}"
        )
    if not is_remote(directory):
        there = next(p for p in (directory, *directory.parents) if p.exists())
        free = shutil.disk_usage(os.fspath(there)).free
        if size > free:
            raise UserError(
                f"data.precompute: rows for all pictures take {in_words(size)}, {there} has {in_words(free)} left: {MEND}"
            )


def _make(source: Source, make: Make, params: Any, shapes: Mapping[str, Any], sides: int, dtype: Any) -> dict[str, np.ndarray]:
    """Over all local devices, a batch at a time."""
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    run = jax.jit(make)
    batch = -(-BATCH // (sides * len(devices))) * len(devices)  # pictures
    kinds = {name: _kept_as(s.dtype, dtype) for name, s in shapes.items()}
    rows = {name: np.zeros((len(source), sides, *s.shape[1:]), kinds[name]) for name, s in shapes.items()}
    began = told = time.monotonic()
    for start in range(0, len(source), batch):
        pictures = np.stack([source[min(start + k, len(source) - 1)][0] for k in range(batch)])
        both = np.stack([pictures, pictures[:, :, ::-1]][:sides], axis=1).reshape(-1, *pictures.shape[1:])
        for name, value in run(params, jax.device_put(both, place)).items():
            value = np.asarray(value).reshape(batch, sides, *value.shape[1:])[: len(source) - start]
            if rows[name].dtype == np.float16 and np.abs(value).max(initial=0) > np.finfo(np.float16).max:
                rows[name] = rows[name].astype(np.float32)
            rows[name][start : start + batch] = value
        done = min(start + batch, len(source))
        if time.monotonic() - told > 5:
            told = time.monotonic()
            left = (told - began) / done * (len(source) - done)
            print(f"encoding pictures: {done} of {len(source)}, {left:.0f} s left", file=sys.stderr, flush=True)
    return rows


def _kept_as(made: Any, dtype: Any) -> np.dtype:
    return np.dtype(dtype) if np.issubdtype(made, np.floating) else np.dtype(made)


def _read(directory: Path, shapes: Mapping[str, Any], count: int) -> dict[str, np.ndarray] | None:
    try:
        json.loads((directory / "key.json").read_text())
        rows = {}
        for name in shapes:
            with (directory / f"{name}.npy").open("rb") as file:
                rows[name] = np.load(file)
    except (OSError, ValueError, EOFError):
        return None
    fits = all(len(value) == count and value.shape[2:] == shapes[name].shape[1:] for name, value in rows.items())
    return rows if fits else None
