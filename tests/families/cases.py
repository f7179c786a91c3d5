"""Tiny random AutoencoderKLs of diffusers: a case is references/NAME.json (its config) and, made from it by
scripts/make_autoencoder_references.py, NAME.npz with what diffusers and PyTorch compute.

Weights, pictures and latents are in neither: both sides draw them from their names."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

REFERENCES = Path(__file__).parent / "references"
NAMES = sorted(file.stem for file in REFERENCES.glob("*.json"))
SIZE, COUNT = 16, 2  # of the pictures


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32, a function of name and shape; kernels keep the variance of what goes through them."""
    # RandomState, whose stream is frozen; default_rng's may change with numpy.
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) <= 1:
        return np.asarray(drawn * 0.2 + (1.0 if name.endswith("weight") else 0.0), np.float32)
    return (drawn * (1.5 / np.sqrt(np.prod(shape[1:])))).astype(np.float32)


def config(name: str) -> dict[str, Any]:
    return json.loads((REFERENCES / f"{name}.json").read_text())


def pictures(channels: int) -> np.ndarray:
    """float32 [COUNT, channels, SIZE, SIZE] in [-1, 1]."""
    return np.tanh(random_tensor("pictures", (COUNT, channels * SIZE * SIZE)) * 20).reshape(COUNT, channels, SIZE, SIZE)
