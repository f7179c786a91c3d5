"""Hugging Face safetensors into parameter trees, strictly: every tensor is used or named as ignored, all are checked."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxgen.errors import UserError
from jaxgen.nn.module import Params, unflatten

PICKLES = ("pytorch_model.bin", "model.bin", "*.pt", "*.pth", "*.ckpt", "*.bin")


def load(
    directory: Path,
    table: dict[str, tuple[str, bool]],
    shapes: dict[str, tuple[int, ...]],
    ignored: tuple[str, ...] = (),
    prefixes: tuple[str, ...] = (),
) -> Params:
    """float32 parameters from `directory`'s model.safetensors (single, or sharded with an index).

    table: their name -> (ours, transposed); shapes: our name -> shape; ignored: name prefixes of tensors left out;
    prefixes: what may stand before every name. Raises UserError naming the tensor that is missing, surplus, misshapen
    or not finite, or the file that is missing, broken or a pickle."""
    sources: dict[str, Path] = {}
    for file in files(directory):
        for name in _open(file).keys():  # noqa: SIM118 (no mapping)
            plain = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
            if not any(plain.startswith(skip) for skip in ignored):
                if plain not in table:
                    raise UserError(f"{file}: tensor {name} belongs to no part of this architecture (surplus)")
                sources[plain] = file
    missing = sorted(table.keys() - sources.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{directory}: tensor {missing[0]} is missing{more}; download the model's files again")
    flat: dict[str, Any] = {}
    for file in sorted(set(sources.values())):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                plain = next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)
                if sources.get(plain) == file:
                    ours, transposed = table[plain]
                    flat[ours] = _read(opened, file, name, shapes[ours], transposed)
    return unflatten(flat)


def files(directory: Path) -> list[Path]:
    """The safetensors files of a model's directory."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index} is no valid index ({error}); download it again") from None
        for name in names:
            if not (directory / name).is_file():
                raise UserError(f"{directory / name} is missing, which {index.name} names; download it again")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickled:
        raise UserError(
            f"{directory} has only {pickled[0]}, a pickle, which can run code and is not read: take the model's "
            "safetensors revision, or write one with transformers' save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{directory} has no model.safetensors; give a Hugging Face model directory that has one")


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), "numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}); download it again") from None


def _read(opened: Any, file: Path, name: str, shape: tuple[int, ...], transposed: bool) -> np.ndarray:
    found = tuple(opened.get_slice(name).get_shape())
    wanted = shape[::-1] if transposed else shape
    if found != wanted:
        raise UserError(f"{file}: tensor {name} has shape {list(found)} and config.json asks for {list(wanted)}")
    try:
        value = opened.get_tensor(name)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:  # the last for 8-bit floats
        raise UserError(f"{file}: tensor {name} cannot be read ({error}); download it again") from None
    if value.dtype.kind not in "fV":  # bfloat16 is of kind V
        raise UserError(f"{file}: tensor {name} is {value.dtype}, not a floating-point one")
    value = np.ascontiguousarray(value.T if transposed else value).astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{file}: tensor {name} holds NaN or infinity; download it again")
    return value
