"""Writes tests/families/references/NAME.npz for each NAME.json there: what diffusers and PyTorch compute for tiny
AutoencoderKLs.

    python scripts/make_autoencoder_references.py [NAME ...]

Needs torch and diffusers. A case's JSON has the fields that differ from the class's defaults. Kept are the tensors' names and
shapes as diffusers saves them, its config.json, the posterior's mean and log variance of random pictures, and what the mean
decodes to, [B, C, H, W] each and in the model's own scale."""

import json
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.families.cases import NAMES, REFERENCES, config, pictures, random_tensor

FILE = "diffusion_pytorch_model.safetensors"


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        out = reference(config(name))
        np.savez_compressed(REFERENCES / f"{name}.npz", **out)
        print(name, {key: value.shape for key, value in out.items() if value.shape})


def reference(values: dict) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        diffusers.AutoencoderKL(**values).save_pretrained(directory)
        with safe_open(str(directory / FILE), "numpy") as file:
            shapes = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
        flat = {tensor: random_tensor(tensor, shape) for tensor, shape in shapes.items()}
        save_file(flat, directory / FILE, metadata={"format": "pt"})
        saved = json.loads((directory / "config.json").read_text())
        model = diffusers.AutoencoderKL.from_pretrained(directory, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        posterior = model.encode(torch.tensor(pictures(saved["in_channels"]))).latent_dist
        decoded = model.decode(posterior.mean).sample
    out = {"mean": posterior.mean, "log": posterior.logvar, "decoded": decoded}
    out = {key: value.numpy() for key, value in out.items()}
    return out | {"tensors": np.array(json.dumps(shapes)), "config": np.array(json.dumps(saved))}


if __name__ == "__main__":
    main()
