"""Whether a long run's memory stays what it is: the resident memory of train.py over many small steps.

    python benchmarks/flat_memory.py [--steps=20000] [--from_step=2000] [--workdir=DIR] [--json=FILE]

A tiny run with logs, samples, evaluations and checkpoints all along. Told are the least and the most memory met from
`--from_step` on, when everything has come once, and the slope of a line through it. Exit status 1: more than 2% above or below
the middle of the two. Linux only (/proc)."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from training import ROOT, environment

from jaxgen.errors import UserError, cli

LIMIT = 0.02
CONFIG = """
from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.train.config import EvalConfig, OptimizerConfig, RunConfig, SampleConfig, TrainConfig

def get_config():
    return RunConfig(
        family=Flow(network=UNet(widths=(8, 16), down=(1, 1), up=(1, 1), head_dim=8)),
        data=DataConfig(image_size=16, train_examples=2000, dir={data!r}),
        train=TrainConfig(steps={steps}, batch_size=8, log_every=50, checkpoint_every={every}),
        sample=SampleConfig(prompts=("a small red circle",), every={every}, num_steps=3),
        eval=EvalConfig(every={every}, count=32),
    )
"""


def watch(process: subprocess.Popen, arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """(step, kB resident) twice a second until the run ends."""
    step = 0

    def read() -> None:
        nonlocal step
        for line in process.stdout or ():
            if found := re.match(r"step (\d+)/", line):
                step = int(found[1])

    threading.Thread(target=read, daemon=True).start()
    met = []
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        if (found := re.search(r"VmRSS:\s+(\d+)", status)) and arguments.from_step <= step < arguments.steps:
            met.append((step, int(found[1])))
        time.sleep(0.5)
    process.wait()
    return met


@cli
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--from_step", type=int, default=2000)
    parser.add_argument("--workdir", help="a new directory (default: a temporary one)")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxgen-memory-") as scratch:
        place = Path(arguments.workdir or scratch).resolve()
        place.mkdir(parents=True, exist_ok=True)
        every = max(arguments.from_step // 2, 1)
        (place / "tiny.py").write_text(CONFIG.format(data=str(place / "data"), steps=arguments.steps, every=every))
        command = [sys.executable, str(ROOT / "train.py"), f"--config={place / 'tiny.py'}", f"--workdir={place / 'run'}"]
        with open(place / "errors.txt", "w") as errors:
            process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=errors, text=True)
        met = watch(process, arguments)
        if process.returncode or not met:
            raise UserError(f"train.py ended with status {process.returncode}: {(place / 'errors.txt').read_text()[-500:]}")
    steps, memory = np.array(met, float).T
    low, high, slope = memory.min(), memory.max(), np.polyfit(steps, memory, 1)[0]
    middle = (low + high) / 2
    off = (high - low) / 2 / middle
    print(
        f"steps {steps[0]:.0f} to {steps[-1]:.0f}: {low / 1000:.1f} to {high / 1000:.1f} MB resident, ±{off:.2%}; "
        f"a line through it rises {slope:.3f} kB a step"
    )
    for part in np.array_split(np.arange(len(steps)), 9):
        print(f"  step {steps[part[0]]:6.0f}  {memory[part].mean() / 1000:8.1f} MB")
    if arguments.json:
        figures = {"low_kb": low, "high_kb": high, "off": off, "kb_a_step": slope, "met": met, "settings": vars(arguments)}
        Path(arguments.json).write_text(json.dumps(figures) + "\n")
    sys.exit(off > LIMIT)


if __name__ == "__main__":
    main()
