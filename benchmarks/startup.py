"""From the command to the first step done, in new processes: nothing there, data prepared, and programs compiled as well.

    python benchmarks/startup.py [--torch_python=PYTHON] [--config=configs/quickstart.py] [--rounds=3] [--json=FILE]

cold: empty caches: Python's sources and programs compiled, pictures drawn and written, the first captions encoded. prepared:
programs alone are not there. warm: those too, as for a run that goes on. The peer, where PYTHON has torch, takes its first step
of the same network (generators_torch.py) on data that are there, eager, compiled anew and with its compiled code cached; it
reads no text and writes no logs, and so has less to do. A round is one start of each, in rotating order; told are medians.

Targets, for the quickstart on a CPU: 60 s cold, 10 s warm."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workers import ROOT, Worker, environment, median, rotated, versions

KINDS = ("cold", "prepared", "warm")
TARGETS = {"cold": 60.0, "warm": 10.0}  # seconds


class Starts:
    def __init__(self, place: Path, arguments: argparse.Namespace):
        self.place, self.arguments = place, arguments
        self.environment = environment(place) | {"PYTHONPYCACHEPREFIX": str(place / "bytecode")}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user has what the last start compiled

    def ours(self, kind: str, keeps: bool = False) -> float:
        """Seconds until train.py has told of its first step; `keeps`: until it has kept the captions it has encoded."""
        with tempfile.TemporaryDirectory(dir=self.place) as fresh:
            data = Path(fresh) if kind == "cold" else self.place
            programs = self.place if kind == "warm" else Path(fresh)
            command = [sys.executable, str(ROOT / "train.py"), f"--config={self.arguments.config}", f"--workdir={fresh}/run"]
            command += [f"--config.data.dir={data / 'data'}", "--config.train.log_every=1"]
            caches = {"JAX_COMPILATION_CACHE_DIR": str(programs / "xla")}
            if kind == "cold":
                caches["PYTHONPYCACHEPREFIX"] = f"{fresh}/bytecode"
            with open(self.place / "errors.txt", "w") as errors:
                began = time.perf_counter()
                process = subprocess.Popen(
                    command, env=self.environment | caches, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            try:
                for line in process.stdout or ():
                    if line.startswith("step ") and (not keeps or any(data.glob("data/captions/*/features.npy"))):
                        return time.perf_counter() - began
            finally:
                process.kill()
                process.wait()
        sys.exit(f"train.py ended before its first step\n{(self.place / 'errors.txt').read_text()[-3000:]}")

    def theirs(self, variant: str, problem: dict[str, Any]) -> float:
        """Seconds until PyTorch has taken its first step; "compiled anew" without its cache."""
        caches = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=self.place)} if variant == "compiled anew" else {}
        command = [self.arguments.torch_python, str(ROOT / "benchmarks" / "generators_torch.py")]
        began = time.perf_counter()
        worker = Worker(command, self.environment | caches, self.place / "torch.txt")
        worker.ask(do="load", problem=problem, file=str(self.place / "problem.npz"))
        worker.ask(do="prepare", kind="train", variant=variant.partition(" ")[0], drawn=True)
        worker.ask(do="time", variant=variant.partition(" ")[0], count=1)
        seconds = time.perf_counter() - began
        worker.end()
        shutil.rmtree(caches.get("TORCHINDUCTOR_CACHE_DIR", ""), ignore_errors=True)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch_python", help="an interpreter with torch in it; without, there is no peer")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    against = versions(arguments.torch_python, ("torch",), parser) if arguments.torch_python else "no peer"
    with tempfile.TemporaryDirectory(prefix="jaxgen-startup-") as scratch:
        starts = Starts(Path(scratch), arguments)
        work: dict[str, Any] = {kind: lambda kind=kind: starts.ours(kind) for kind in KINDS}
        if arguments.torch_python:
            here = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--worker"]
            writer = Worker(here, starts.environment, starts.place / "writer.txt")
            problem = writer.ask(do="write", name="unet", file=str(starts.place / "problem.npz"), bfloat16=False)
            writer.end()
            for variant in ("eager", "compiled", "compiled anew"):
                work[variant] = lambda variant=variant: starts.theirs(variant, problem)
            starts.theirs("compiled", problem)  # fills its cache
        starts.ours("warm", keeps=True)  # fills ours, and prepares the data
        found: dict[str, list[float]] = {name: [] for name in work}
        for name in rotated(tuple(work), arguments.rounds):
            found[name].append(work[name]())
    print(f"{len(os.sched_getaffinity(0))} cores; {against}; seconds to the first step, medians of {arguments.rounds}")
    for name, seconds in found.items():
        limit = TARGETS.get(name, float("inf"))
        print(f"{name:14s}{median(seconds):8.1f}" + (f"  misses {limit:.0f}" if median(seconds) > limit else ""))
    if arguments.json:
        from jaxgen.storage import as_path, write_json

        write_json(as_path(arguments.json), {"against": against, "settings": vars(arguments), "seconds": found})


if __name__ == "__main__":
    main()
