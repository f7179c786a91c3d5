"""How much of a run's wall time goes into steps that count, while it is killed again and again.

    python benchmarks/goodput.py [--every=120] [--kills=10] [--config=configs/quickstart.py] [--workdir=DIR] [--json=FILE]
        [-- --config.train.checkpoint_every=100 ...]

train.py is started, gets SIGKILL `--every` seconds after its last start, and is started again at once; after the last kill it
runs as long once more and is asked to stop. What it tells of itself in metrics.jsonl is printed: the shares of its wall time,
the first start with nothing compiled apart from the others. Overrides after -- are train.py's.

Targets: goodput 0.85 with a kill every 2 minutes, 0.97 every 10."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training import ROOT, environment

from jaxgen.errors import UserError, cli
from jaxgen.train.goodput import PHASES

TARGETS = {120.0: 0.85, 600.0: 0.97}  # seconds between kills: goodput


def run(arguments: argparse.Namespace, overrides: list[str], workdir: Path) -> dict[str, Any]:
    """The last line's phases in seconds over all starts but the first, and that one's."""
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT / arguments.config}", f"--workdir={workdir}"]
    command += ["--config.train.steps=1000000", "--config.sample.prompts=", "--config.train.log_every=10", *overrides]
    first: dict[str, float] = {}
    for start in range(arguments.kills + 1):
        with open(workdir.with_name(f"{workdir.name}.log"), "a") as log:
            process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
            if start == 0:  # its compilation comes once in a run's life
                while process.poll() is None and not first.get("step"):
                    time.sleep(0.5)
                    first = last(workdir)
            until = time.monotonic() + arguments.every
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
            if process.poll() is not None:
                raise UserError(f"train.py ended by itself (status {process.returncode}): see {log.name}")
            process.send_signal(signal.SIGKILL if start < arguments.kills else signal.SIGTERM)
            process.wait()
        print(f"start {start + 1}: {told(last(workdir))}", flush=True)
    spent = last(workdir)
    return {"spent": spent, "first": first, "after": {phase: spent[phase] - first.get(phase, 0.0) for phase in spent}}


def last(workdir: Path) -> dict[str, float]:
    """Seconds of each phase as of the last line of metrics.jsonl; nothing before there is one."""
    file = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = next((line for line in reversed(lines) if "goodput" in line), {})
    return {phase: found[f"{phase}_s"] for phase in PHASES} if found else {}


def told(spent: dict[str, float]) -> str:
    whole = sum(spent.values()) or 1.0
    return f"{spent.get('step', 0.0) / whole:.3f} of {whole:.0f} s in steps that count; " + ", ".join(
        f"{phase} {seconds / whole:.1%}" for phase, seconds in spent.items()
    )


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=120.0, help="seconds from a start to its kill")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--workdir", help="a new directory (default: a temporary one)")
    parser.add_argument("--json", help="write the figures here")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    arguments, overrides = parser.parse_args(given[:cut]), given[cut + 1 :]
    with tempfile.TemporaryDirectory(prefix="jaxgen-goodput-") as scratch:
        workdir = Path(arguments.workdir or f"{scratch}/run").resolve()
        if workdir.exists():
            raise UserError(f"--workdir={workdir} exists: choose a new directory")
        workdir.parent.mkdir(parents=True, exist_ok=True)
        found = run(arguments, overrides, workdir)
    print(f"with the first start's compilation: {told(found['spent'])}\nwithout it: {told(found['after'])}")
    if arguments.every in TARGETS:
        print(f"target: {TARGETS[arguments.every]}")
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({**found, "settings": vars(arguments), "overrides": overrides}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
