"""train.py run to its end by a benchmark, in a directory of its own: cut, it goes on; finished, it is not trained twice."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxgen.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def train(name: str, arguments: Sequence[str], steps: int, workdir: Path) -> None:
    """`arguments` are train.py's and name workdir and steps as well. Raises UserError where train.py fails or is stopped."""
    if finished(steps, workdir):
        print(f"{name}: {workdir} is finished", flush=True)
        return
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log = workdir.with_name(f"{workdir.name}.log")
    print(f"{name}: training {steps} steps; see {log}", flush=True)
    with log.open("a") as out:
        command = [sys.executable, str(ROOT / "train.py"), *arguments]
        done = subprocess.run(command, env=environment(), stdout=out, stderr=subprocess.STDOUT)
    if done.returncode or not finished(steps, workdir):
        last = (log.read_text().strip().splitlines() or ["nothing was said"])[-1]
        raise UserError(f"{name} was not trained to its end (status {done.returncode}: {last}); the same command tries again")


def environment() -> dict[str, str]:
    """This process's, for a train.py of this checkout."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def finished(steps: int, workdir: Path) -> bool:
    return (workdir / "checkpoints" / str(steps)).is_dir()
