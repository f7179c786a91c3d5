"""PyTorch's pickled weights to safetensors, once: `python -m jaxgen.text.convert SRC DST` (extra `torch`).

SRC is a directory with pytorch_model.bin, pytorch_model.bin.index.json or one *.pt, *.pth, *.ckpt or *.bin, or such a file;
DST a new directory. torch.load(weights_only=True) runs no code of the file's."""

import argparse
import shutil
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

from jaxgen.errors import UserError
from jaxgen.parallel.runtime import require
from jaxgen.text import sources
from jaxgen.text.weights import PICKLES

INDEX = "pytorch_model.bin.index.json"
SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def convert(source: Path, target: Path) -> list[Path]:
    """Writes model.safetensors and copies the other files into `target`; returns what it wrote.

    Raises UserError for a source without pickled weights, one that torch refuses, a target that is not empty, and where
    torch is missing."""
    require(("torch",), "torch")
    from safetensors.torch import save_file

    chosen = pickles(source)
    sources.check_new(target)
    tensors: dict[str, Any] = {}
    for file in chosen:
        for name, tensor in read(file).items():
            if name in tensors:
                raise UserError(f"{file}: tensor {name!r} is there twice, also in another file of {source}")
            tensors[name] = tensor
    directory = source if source.is_dir() else source.parent
    config = [directory / name for name in ("config.json", "generation_config.json") if (directory / name).is_file()]
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for file in [*sources.tokenizer_files(directory), *sources.extra_files(directory), *config]:
        copy = target / file.relative_to(directory)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
        written.append(copy)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return [target / "model.safetensors", *written]


def pickles(source: Path) -> list[Path]:
    """The pickled weights of a directory, as transformers names them or the only ones there; or the file itself."""
    if source.is_file() and source.suffix in SUFFIXES:
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} is no directory and no {', '.join(SUFFIXES)} file")
    if (source / INDEX).is_file():
        index = sources.read_json(source / INDEX).get("weight_map")
        names = list(dict.fromkeys(index.values())) if isinstance(index, dict) and index else [None]
        for name in names:
            if not isinstance(name, str) or "/" in name or not (source / name).is_file():
                raise UserError(f"{source / INDEX} names {name!r}, which is no file beside it; download it again")
        return [source / name for name in names]
    if (source / "pytorch_model.bin").is_file():
        return [source / "pytorch_model.bin"]
    found = sorted({path for pattern in PICKLES for path in source.glob(pattern)})
    if len(found) != 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{source} has {names}: give the file to read" if found else f"{source} has no pickled weights")
    return found


def read(file: Path) -> dict[str, Any]:
    """{name: tensor}, contiguous and each with a memory of its own; a checkpoint's "state_dict" is what counts in it."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):
            # Mapped, not read, where the format allows it: what is copied below is then there once.
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises what its many formats' readers raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"{file}: torch does not load it with weights_only=True ({reason}); get it from who made it") from None
    while isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    items = values.items() if isinstance(values, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no tensors by name")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise UserError(f"{file}: tensor {name!r} is sparse or quantised, which safetensors does not hold")
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jaxgen.text.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    arguments = parser.parse_args()
    try:
        for file in convert(arguments.source, arguments.target):
            print(f"{file} ({file.stat().st_size:,} bytes)")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
