"""Tiny random models of every architecture: a case is references/NAME.json (transformers' class and config) and, made from
it by scripts/make_text_references.py, NAME.npz with what transformers and PyTorch compute.

Weights are in neither: both sides draw them from their names."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

REFERENCES = Path(__file__).parent / "references"
NAMES = sorted(file.stem for file in REFERENCES.glob("*.json"))


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32, a function of name and shape. Matrices are large enough that attention is far from uniform."""
    # RandomState, whose stream is frozen; default_rng's may change with numpy.
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) <= 1:
        return np.asarray(draw * 0.2 + (1.0 if name.endswith("weight") else 0.0), np.float32)
    embedding = any(part in name for part in ("embed", "wte", "wpe", "shared"))
    return (draw * (1.0 if embedding else 1.5 / np.sqrt(min(shape)))).astype(np.float32)


def write(directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """A Hugging Face directory without a tokenizer."""
    (directory / "config.json").write_text(json.dumps(config))
    flat = {name: random_tensor(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(flat, directory / "model.safetensors", metadata={"format": "pt"})


class Case:
    def __init__(self, name: str):
        self.name = name
        self.spec = json.loads((REFERENCES / f"{name}.json").read_text())
        self.config, self.model, self.head = self.spec["config"], self.spec["model"], self.spec.get("head", "")

    @property
    def stored(self) -> dict[str, np.ndarray]:
        with np.load(REFERENCES / f"{self.name}.npz") as file:
            return dict(file)

    def write(self, directory: Path) -> None:
        stored = self.stored
        shapes = json.loads(str(stored["tensors"]))
        write(directory, json.loads(str(stored["config"])), {name: tuple(shape) for name, shape in shapes.items()})
