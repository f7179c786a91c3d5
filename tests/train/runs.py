"""How tests start runs of train.py and read what they leave. `place` holds tiny.py, the configuration, and gets the rest."""

import os
import sys
from pathlib import Path

import numpy as np

import jaxgen
from jaxgen.nn.module import flatten
from tests.quick import XLA_FLAGS

ROOT = Path(__file__).parents[2]


def command(place, name, *more):
    return [sys.executable, str(ROOT / "train.py"), f"--config={place / 'tiny.py'}", f"--workdir={place / name}", *more]


def environment(place, devices=2):
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    keep |= {"XLA_FLAGS": XLA_FLAGS}
    mine = {"JAXGEN_CPU_DEVICES": str(devices), "JAX_COMPILATION_CACHE_DIR": str(place / "xla"), "PYTHONPATH": str(ROOT)}
    return keep | mine | {"JAXGEN_KEEP_PROGRAMS": "1"}


def weights(workdir):
    return {name: np.asarray(leaf) for name, leaf in flatten(jaxgen.load(str(workdir)).params)}
