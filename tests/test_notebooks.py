"""The notebooks run from top to bottom, with a small part of their budget and without Jupyter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jaxgen
from jaxgen.evaluate.pictures import save_png
from jaxgen.storage import as_path
from tests.quick import XLA_FLAGS

ROOT = Path(__file__).parents[1]
FAMILIES, COLAB = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("families", "colab"))
# Its code cells in one process, one after the other; displays go to files.
RUN = """
import json, sys
sys.modules["IPython"] = None
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), globals())
"""


def cells(path):
    """The sources of its code cells."""
    notebook = json.loads(path.read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def begin(path, place, **environment):
    settings = {"JAXGEN_NOTEBOOK_SHARE": "1e-3", "JAXGEN_CPU_DEVICES": "1", "HOME": str(place), "PYTHONPATH": str(ROOT)}
    settings |= {"XLA_FLAGS": XLA_FLAGS}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", RUN, str(path)], env=os.environ | settings | environment, cwd=place, **pipes)


def finish(running):
    """What it printed."""
    out, errors = running.communicate()
    assert running.returncode == 0, errors[-3000:]
    return out


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_printed(path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_families(tmp_path):
    out = finish(begin(FAMILIES, tmp_path))
    pages = sorted(tmp_path.glob("runs/*/*.png"))
    assert [page.stem for page in pages] == sorted(p.parent.name for p in tmp_path.glob("runs/*/*/metrics.jsonl"))
    assert len(pages) == out.count("finished at step") == sum("learn(" in cell for cell in cells(FAMILIES)) - 1
    for page in pages:
        assert np.asarray(Image.open(page)).std() > 5


def test_colab_goes_on_after_its_session_died(tmp_path):
    checkpoints, pictures = tmp_path / "runs" / "quickstart" / "checkpoints", tmp_path / "runs" / "pictures"
    pictures.mkdir(parents=True)
    for number in range(24):
        save_png(as_path(pictures / f"{number}.png"), np.full((40, 40, 3), 10 * number, np.uint8), {})
        (pictures / f"{number}.txt").write_text(f"shade {number}")
    dying = begin(COLAB, tmp_path)
    while not (checkpoints / "1").exists():
        assert dying.poll() is None, dying.communicate()[1][-3000:]
        time.sleep(0.02)
    dying.kill()
    dying.communicate()
    kept = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
    out = finish(begin(COLAB, tmp_path))
    assert "jax" in out.partition("on cpu")[0]
    assert f"from step {kept} to 3" in out or kept == 3
    assert "24 pictures, 24 with captions" in out
    for name in ("scenes", "mine-24"):
        assert np.asarray(Image.open(tmp_path / "runs" / f"{name}.png")).std() > 5
    exported = jaxgen.load(str(tmp_path / "runs" / "exported"))
    assert exported.sample(["a large purple cross"], num_steps=2).shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("installed", "wanted", "held"),
    [
        # What is in range stays, with its plugins, and CUDA is not asked for.
        (
            {"jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "nvidia-cudnn-cu12": "9.1", "numpy": "2.0"},
            [],
            ["jax==0.10.2", "jax-cuda12-plugin==0.10.2", "jaxlib==0.10.2"],
        ),
        ({"jax": "0.11.1", "jaxlib": "0.11.1", "libtpu": "0.0.40"}, [], ["jax==0.11.1", "jaxlib==0.11.1", "libtpu==0.0.40"]),
        # An older or newer one is exchanged together with what belongs to it.
        (
            {"jax": "0.7.2", "jaxlib": "0.7.2", "jax-cuda12-plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2", "jaxtyping": "0.3"},
            ["jax-cuda12-pjrt>=0.10,<0.12", "jax-cuda12-plugin>=0.10,<0.12", "jaxlib>=0.10,<0.12"],
            [],
        ),
        ({"jax": "0.12.0", "jaxlib": "0.12.0", "libtpu": "0.1"}, ["jaxlib>=0.10,<0.12", "libtpu"], []),
        ({}, [], []),
    ],
)
def test_colab_keeps_the_jax_that_is_there(installed, wanted, held):
    space = {"Path": Path, "PLACE": Path("runs")}
    (cell,) = (cell for cell in cells(COLAB) if "def pip_arguments" in cell)
    exec(cell, space)  # jaxgen is installed: nothing is
    assert space["pip_arguments"]("/a/jaxgen.whl", installed) == (["/a/jaxgen.whl[train]", *wanted], held)
    assert space["pip_arguments"]("git+https://host/jaxgen", {})[0] == ["jaxgen[train] @ git+https://host/jaxgen"]
