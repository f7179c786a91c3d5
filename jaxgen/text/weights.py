"""Hugging Face safetensors into parameter trees and back, strictly: every tensor is used or named as ignored, all are checked.

Each architecture has one table: the flat name of each of our arrays -> where it lies in their files."""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgen.errors import UserError
from jaxgen.nn.module import Params, flatten, unflatten
from jaxgen.text.sources import read_json, sha256

PICKLES = ("pytorch_model.bin", "model.bin", "*.pt", "*.pth", "*.ckpt", "*.bin")
DIGEST = "digest.json"  # {file: SHA-256}, written by save_text_encoder
DTYPES = ("F64", "F32", "F16", "BF16")
# Bytes read at once: all that loading takes beside the parameters, and few enough to be turned within a core's cache.
BLOCK = 2**20


@dataclass(frozen=True)
class Tensor:
    """Where one of our arrays lies: the tensor's name and its layout.

    transposed: stored as [out, in, *window] (PyTorch's Linear and Conv2d), ours is [*window, in, out].
    part: (i, n), ours is the i-th of n equal parts of the stored array along our last axis (a fused q, k, v).
    alias: another name under which some files have it.
    pointwise: some files have this [out, in] as a convolution's [out, in, 1, 1]."""

    name: str
    transposed: bool = False
    part: tuple[int, int] = (0, 1)
    alias: str | None = None
    pointwise: bool = False


Table = Mapping[str, Tensor]


def linear(ours: str, theirs: str, *, bias: bool = True) -> dict[str, Tensor]:
    """A PyTorch Linear or Conv2d in one of ours."""
    table = {f"{ours}.kernel": Tensor(f"{theirs}.weight", transposed=True)}
    return table | ({f"{ours}.bias": Tensor(f"{theirs}.bias")} if bias else {})


def norm(ours: str, theirs: str, *, bias: bool = True) -> dict[str, Tensor]:
    """A PyTorch LayerNorm (or, without bias, RMSNorm) in one of ours."""
    table = {f"{ours}.scale": Tensor(f"{theirs}.weight")}
    return table | ({f"{ours}.bias": Tensor(f"{theirs}.bias")} if bias else {})


def layer(ours: str, theirs: str, names: Mapping[str, str], *, bias: bool = True) -> dict[str, Tensor]:
    """A layer's norms (whose names here begin so) and linear maps; `names` maps ours in it to theirs."""
    table: dict[str, Tensor] = {}
    for mine, its in names.items():
        table |= (norm if mine.startswith("norm") else linear)(f"{ours}.{mine}", f"{theirs}.{its}", bias=bias)
    return table


def load(
    source: Path,
    table: Table,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    ignored: tuple[str, ...] = (),
    prefixes: tuple[str, ...] = (),
    dtype: Any = np.float32,
    shardings: Mapping[str, Any] | None = None,
) -> Params:
    """Parameters from the safetensors of a directory, or from one file.

    table: our flat name -> Tensor; shapes: our flat name -> shape; ignored: regular expressions for the start of names that
    are left out; prefixes: what may stand before a name; shardings: our flat name -> Sharding, whereupon only the slices
    that this process owns are read. Raises UserError naming the tensor that is missing, surplus, misshapen or not finite, or
    the file that is missing, broken, changed or a pickle."""
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(_open(file)) for file in files(source)}
        found: dict[str, tuple[Path, str]] = {}  # plain name -> file, name there
        wanted = {name for t in table.values() for name in (t.name, t.alias) if name}
        for file, reader in opened.items():
            for name in reader.keys():  # noqa: SIM118 (no mapping)
                options = [name, *(name.removeprefix(p) for p in prefixes if name.startswith(p))]
                plain = next((n for n in options if n in wanted), None)
                if plain is None:
                    if not any(re.match(skip, n) for skip in ignored for n in options):
                        raise UserError(f"{file}: tensor {_line(name)} belongs to no part of this architecture (surplus)")
                elif plain in found:
                    raise UserError(
                        f"{file}: tensor {name} is there twice, the other is {found[plain][1]} in {found[plain][0]}"
                    )
                else:
                    found[plain] = (file, name)
        places = {ours: found.get(t.name) or found.get(t.alias or "") for ours, t in table.items()}
        missing = sorted({table[ours].name for ours, place in places.items() if place is None})
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{source}: tensor {missing[0]} is missing{more}; download the model's files again")
        flat: dict[str, Any] = {}
        for ours, place in places.items():
            assert place is not None
            file, name = place
            reader = _Reader(opened[file], file, name, table[ours], shapes[ours], dtype)
            whole = tuple(slice(0, size) for size in shapes[ours])
            # device_put, unlike asarray, makes no copy where the host is the device.
            flat[ours] = jax.device_put(reader.read(whole)) if shardings is None else reader.placed(shardings[ours])
        return unflatten(flat)


class _Reader:
    """One of our arrays, whole or by the slice, from an open file."""

    def __init__(self, opened: Any, file: Path, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: Any):
        self.file, self.name, self.tensor, self.shape, self.dtype = file, name, tensor, shape, dtype
        self.slices = opened.get_slice(name)
        if self.slices.get_dtype() not in DTYPES:
            raise UserError(
                f"{file}: tensor {name} is {self.slices.get_dtype()}, not a floating-point one ({', '.join(DTYPES)})"
            )
        full = (*shape[:-1], shape[-1] * tensor.part[1])
        wanted, found = tuple(full[i] for i in _order(tensor, len(full))), tuple(self.slices.get_shape())
        self.window = (slice(0, 1), slice(0, 1)) if tensor.pointwise and found == (*wanted, 1, 1) else ()
        if found != wanted and not self.window:
            raise UserError(f"{file}: tensor {name} has shape {list(found)} and config.json asks for {list(wanted)}")

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Our array's slice; `index` has a start and a stop on each axis.

        Read in blocks of their rows into one buffer that the device then keeps, so that no tensor is there twice."""
        *first, last = index
        shift = self.tensor.part[0] * self.shape[-1]
        theirs = [*first, slice(last.start + shift, last.stop + shift)]
        value = _empty([s.stop - s.start for s in index], self.dtype)
        order = _order(self.tensor, value.ndim)
        out = value.transpose(order)
        rows, *others = (theirs[i] for i in order)
        step = max(1, BLOCK // (4 * math.prod(out.shape[1:])))
        try:
            with np.errstate(all="ignore"):  # what overflows is found below
                for start in range(rows.start, rows.stop, step):
                    block = slice(start, min(start + step, rows.stop))
                    read = self.slices[(block, *others, *self.window)]
                    out[start - rows.start : block.stop - rows.start] = read[..., 0, 0] if self.window else read
                # The sum first: it needs no memory.
                finite = np.isfinite(value.sum(dtype=np.float32)) or np.isfinite(value).all()
        except (SafetensorError, OSError, TypeError, ValueError) as error:
            raise UserError(f"{self.file}: tensor {self.name} cannot be read ({error}); download it again") from None
        if not finite:
            raise UserError(f"{self.file}: tensor {self.name} holds NaN or infinity; download it again")
        return value

    def placed(self, sharding: Any) -> jax.Array:
        """Our array over devices; a slice that several of them here share is read once."""
        kept: dict[Any, np.ndarray] = {}

        def slice_of(index: Any) -> np.ndarray:
            bounds = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, self.shape, strict=True))
            key = tuple((s.start, s.stop) for s in bounds)
            if key not in kept:
                kept[key] = self.read(bounds)
            return kept[key]

        return jax.make_array_from_callback(self.shape, sharding, slice_of)


def save(file: Path, params: Params, table: Table) -> None:
    """The inverse of `load`: one safetensors file as transformers writes it."""
    flat = {name: np.asarray(leaf) for name, leaf in flatten(jax.device_get(params))}
    save_file(stored(flat, table), file, metadata={"format": "pt"})


def stored(flat: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Our arrays by flat name -> theirs."""
    parts: dict[str, dict[int, np.ndarray]] = {}
    for ours, tensor in table.items():
        parts.setdefault(tensor.name, {})[tensor.part[0]] = flat[ours]
    tensors = {tensor.name: tensor for tensor in table.values()}
    whole = {name: np.concatenate([some[i] for i in sorted(some)], axis=-1) for name, some in parts.items()}
    return {name: np.ascontiguousarray(a.transpose(_order(tensors[name], a.ndim))) for name, a in whole.items()}


def _order(tensor: Tensor, axes: int) -> tuple[int, ...]:
    """Which of our axes each stored axis is."""
    return (axes - 1, axes - 2, *range(axes - 2)) if tensor.transposed else tuple(range(axes))


def files(source: Path) -> list[Path]:
    """The safetensors files of a model's directory: those of its index, model.safetensors, or the only one there is."""
    if source.suffix == ".safetensors" and not source.is_dir():
        return _unchanged([source])
    index = source / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is no valid index ({error}); download it again") from None
        for name in names:
            if not isinstance(name, str) or "/" in name or not (source / name).is_file():
                raise UserError(f"{_line(str(source / str(name)))} is missing, which {index.name} names; download it again")
        return _unchanged([source / name for name in names])
    single = sorted(source.glob("*.safetensors"))
    if source / "model.safetensors" in single:
        return _unchanged([source / "model.safetensors"])
    if len(single) > 1:
        raise UserError(f"{source} has {', '.join(f.name for f in single)} and no index: give the one to read as the source")
    if single:
        return _unchanged(single)
    pickled = sorted(path.name for pattern in PICKLES for path in source.glob(pattern))
    if pickled:
        raise UserError(
            f"{source} has only {pickled[0]}, a pickle, which can run code and is not read: take the model's safetensors "
            f'revision, or convert it: pip install "jaxgen[torch]"; python -m jaxgen.text.convert {source} NEW_DIRECTORY'
        )
    raise UserError(f"{source} has no model.safetensors; give a Hugging Face model directory that has one")


def _unchanged(chosen: list[Path]) -> list[Path]:
    """The files, checked against the digest beside them if there is one."""
    digest = chosen[0].parent / DIGEST if chosen else None
    if digest is None or not digest.exists():
        return chosen
    known = read_json(digest)
    for file in chosen:
        if sha256(file) != known.get(file.name):
            why = "differs" if file.name in known else "is not there"
            raise UserError(f"{file} is not the file that {digest.name} was made for (its SHA-256 {why}): get it again")
    return chosen


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), "numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file ({_line(str(error))}); download it again") from None


def _empty(shape: list[int], dtype: Any) -> np.ndarray:
    """An array at a multiple of 64 bytes, which a CPU device takes over where it lies."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _line(text: str) -> str:
    """What a broken file holds, on one line."""
    return text if text.isprintable() else repr(text)
