"""The notebooks run from top to bottom, with a small part of their budget and without Jupyter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Its code cells in one process, one after the other; displays go to files.
RUN = """
import json, sys
sys.modules["IPython"] = None
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), globals())
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    notebook = json.loads(path.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    settings = {"JAXGEN_NOTEBOOK_SHARE": "1e-3", "JAXGEN_CPU_DEVICES": "1", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    settings |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path)], env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted(tmp_path.glob("runs/*/*.png"))
    assert [page.stem for page in pages] == sorted(p.parent.name for p in tmp_path.glob("runs/*/*/metrics.jsonl"))
    assert (
        len(pages)
        == done.stdout.count("finished at step")
        == sum("learn(" in "".join(c["source"]) for c in notebook["cells"]) - 1
    )
    for page in pages:
        assert np.asarray(Image.open(page)).std() > 5
