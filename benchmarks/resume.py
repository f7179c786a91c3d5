"""Whether a killed run goes on exactly: SIGKILL at random moments, saves included, against the run nobody touched.

    python benchmarks/resume.py [--kills=20] [--during_saves=5] [--terms=5] [--steps=400] [--processes=1] [--seed=0]
        [--dir=DIR] [--json=FILE]

One tiny run is left alone; the same command on one other workdir is killed and started again until it has finished, and
on a third one SIGTERM is sent (how long from the end of its step to the saved exit?). With --processes=2 a run is two
processes of one JAX program, a signal meets one of them by lot, and the other one has to end by itself within a minute. The
exit status is 1 where any weight, average, moment, loss or batch differs in one bit, a checkpoint once written is not gone on
from, something half-written stays, or too few kills met a save. About ten seconds a kill on two cores."""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxgen.text.scratch import scene_captions, write
from jaxgen.train.checkpoints import TEMPORARY
from jaxgen.train.goodput import TOLD

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.text.config import TextConfig
from jaxgen.train.config import OptimizerConfig, RunConfig, TrainConfig

def get_config():
    return RunConfig(
        family=Flow(network=Transformer(width={width}, depth=1, head_dim=16, dropout=0.1)),
        data=DataConfig(image_size=16, train_examples=512, dir={data!r}),
        train=TrainConfig(steps={steps}, batch_size=8, log_every=1, checkpoint_every={every}),
        text=TextConfig(source={text!r}),
        optimizer=OptimizerConfig(warmup_steps=20),
    )
"""
TIMED = ("step_ms", "images_per_sec", "gflops", "mfu", *TOLD)  # of a training line
# More weights than the pictures need, so that saves take their time; but of several processes JAX keeps the compiled program of
# the first alone, and the others compile at each start.
WIDTHS = (256, 64)  # of one process, of several
DEVICES = 2  # of a run, whatever its processes
PEER = 60.0  # seconds within which a process notices that another one has died
# Kinds of moments and their shares; what is left of the kills meets a step.
SHARES = {"saving": 0.35, "start-up": 0.15, "restoring": 0.15, "compiling": 0.1}


class Child:
    """A train.py under way: what it has told so far, and when."""

    def __init__(self, place: Path, name: str, processes: int = 1):
        self.workdir, self.count = place / name, processes
        command = [sys.executable, str(ROOT / "train.py"), f"--config={place / f'{name}.py'}", f"--workdir={self.workdir}"]
        if processes > 1:
            together = ["-m", "jaxgen.parallel.launch", f"--processes={processes}", f"--devices={DEVICES // processes}", "--"]
            command = [sys.executable, *together, *command]
        self.errors = place / f"{name}.stderr"
        self.began = time.monotonic()
        self.phase, self.resumed, self.step = "start-up", None, None
        self.saves: list[float] = []  # seconds each
        self.times: dict[str, float] = {}  # seconds after the start
        self.last_step_line = self.began
        with open(self.errors, "a") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(place, processes)
            )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            now = time.monotonic()
            if found := re.search(r"from step (\d+) to", line):
                self.resumed, self.phase = int(found[1]), "compiling"
                self.times["restored"] = now - self.began
            elif found := re.match(r"step (\d+)/", line):
                self.last_step_line, self.step, self.phase = now, int(found[1]), "training"
                self.times.setdefault("first step", now - self.began)

    def saving(self) -> set[str]:
        """The checkpoints being written; what an earlier kill left is removed before the first step."""
        return temporary(self.workdir) if self.phase == "training" else set()

    def wait_until(self, reached: Any) -> bool:
        """Until `reached()`; False where the run ends before."""
        while not reached():
            if self.process.poll() is not None:
                return False
            time.sleep(0.002)
        return True

    def members(self) -> list[int]:
        """The numbers of the run's processes, in their order."""
        if self.count == 1:
            return [self.process.pid]
        try:
            return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]
        except OSError:
            return []

    def send(self, number: int, rng: random.Random) -> int:
        """To a process by lot, whose place is returned."""
        self.wait_until(lambda: len(self.members()) == self.count)
        place = rng.randrange(self.count)
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(self.members()[place], number)
        return place

    def end(self) -> int:
        status = self.process.wait()
        self._reader.join()
        return status

    def finish(self, during: str) -> None:
        """To its own end, timing its saves; anything but success ends this program."""
        since = None
        while self.process.poll() is None:
            now, busy = time.monotonic(), bool(self.saving())
            if busy and since is None:
                since = now
            elif not busy and since is not None:
                self.saves.append(now - since)
                since = None
            time.sleep(0.005)
        if status := self.end():
            sys.exit(f"{during}: train.py ended with status {status}\n{self.errors.read_text()[-3000:]}")


def environment(place: Path, processes: int) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    mine = {
        "JAX_PLATFORMS": "cpu",
        "JAXGEN_CPU_DEVICES": str(DEVICES),
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
    }
    # Where starts compile anew, they do it quickly rather than well.
    mine |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"} if processes > 1 else {}
    return keep | mine | {"PYTHONPATH": str(ROOT)}


def temporary(workdir: Path) -> set[str]:
    try:
        return {name for name in os.listdir(workdir / "checkpoints") if TEMPORARY in name}
    except FileNotFoundError:
        return set()


def whole(workdir: Path) -> list[int]:
    """The steps of the checkpoints that are on disk."""
    directory = workdir / "checkpoints"
    return sorted(int(name) for name in (os.listdir(directory) if directory.exists() else ()) if name.isdigit())


def plan(kills: int, during_saves: int, steps: int, rng: random.Random) -> list[tuple[str, int]]:
    """(kind, step not before which it comes) of each kill; the first meets a start from nothing."""
    kinds = [kind for kind, share in SHARES.items() for _ in range(round(share * kills))]
    kinds += ["saving"] * (during_saves - kinds.count("saving"))
    kinds = (kinds + ["training"] * kills)[:kills]
    rng.shuffle(kinds)
    if "start-up" in kinds:
        kinds.insert(0, kinds.pop(kinds.index("start-up")))
    running = sum(kind in ("saving", "training") for kind in kinds)
    targets = iter(sorted(int(steps * 0.9 * (i + rng.random()) / max(running, 1)) for i in range(running)))
    return [(kind, next(targets) if kind in ("saving", "training") else 0) for kind in kinds]


def kill(child: Child, kind: str, target: int, usual: dict[str, float], rng: random.Random) -> dict[str, Any] | None:
    """Wait for the moment and kill; what was met, or None where the run finished before."""
    moment = {
        "start-up": child.began + rng.uniform(0, usual["restored"]),
        "restoring": child.began + rng.uniform(0.85, 1.0) * usual["restored"],
        "compiling": child.began + rng.uniform(usual["restored"], usual["first step"]),
    }
    if kind in moment:
        reached = lambda: time.monotonic() >= moment[kind] or child.phase == "training"  # noqa: E731
    else:
        reached = lambda: child.step is not None and child.step >= target  # noqa: E731
    alive = child.wait_until(reached)
    if kind == "training":
        time.sleep(rng.uniform(0, 0.2))
    elif kind == "saving":
        alive = alive and child.wait_until(lambda: not child.saving()) and child.wait_until(child.saving)
        time.sleep(rng.uniform(0, 0.7) * usual["save"])
    before = child.saving()
    phase = child.phase
    hit = child.send(signal.SIGKILL, rng)
    sent = time.monotonic()
    if child.end() == 0 or not alive:
        return None
    met = sorted(before & child.saving())
    return {
        "aimed": kind,
        "process": hit,
        "all_gone": round(time.monotonic() - sent, 2),
        "seconds": round(time.monotonic() - child.began, 2),
        "from_step": child.resumed,
        "step": child.step,
        "phase": "saving" if met else phase,
        "half_written": met,
        "whole": whole(child.workdir),
    }


def kill_and_restart(place: Path, arguments: Any, usual: dict[str, float], problems: list[str]) -> list[dict[str, Any]]:
    rng = random.Random(arguments.seed)
    kinds = plan(arguments.kills, arguments.during_saves, arguments.steps, rng)
    kills: list[dict[str, Any]] = []
    print(f"{'kill':>4s} {'after':>7s}  {'went on from':>12s} {'step':>5s}  {'phase':10s} checkpoints on disk; half-written")
    while True:
        expected = max(whole(place / "killed"), default=0)
        child = Child(place, "killed", arguments.processes)
        if kinds:
            kind, target = kinds.pop(0)
            row = kill(child, kind, target, usual, rng)
            if row is None:
                break
            if "first step" in child.times:  # with everything compiled before
                usual |= child.times
            kills.append(row)
            if row["all_gone"] > PEER:
                problems.append(f"kill {len(kills)} of process {row['process']}: the rest ended {row['all_gone']} s later")
            told = ", ".join(map(str, row["whole"])) + ("; " + ", ".join(row["half_written"]) if row["half_written"] else "")
            start = "-" if row["from_step"] is None else row["from_step"]
            print(
                f"{len(kills):4d} {row['seconds']:6.1f}s  {start:>12} {row['step'] or '-':>5}  {row['phase']:10s} {told}",
                flush=True,
            )
            if kind == "saving" and row["phase"] != "saving":  # it was over sooner: another one is to meet a save
                index = next((i for i, (other, _) in enumerate(kinds) if other == "training"), None)
                if index is not None:
                    kinds[index] = ("saving", kinds[index][1])
        else:
            child.finish("the last start after the kills")
        if child.resumed not in (None, expected):
            problems.append(f"after kill {len(kills)} it went on from step {child.resumed}, though {expected} was on disk")
        if child.process.returncode == 0:
            break
    if len(kills) < arguments.kills:
        problems.append(f"the run finished after {len(kills)} kills of {arguments.kills}: raise --steps")
    met = sum(row["phase"] == "saving" for row in kills)
    if met < arguments.during_saves:
        problems.append(f"{met} kills met a save, fewer than {arguments.during_saves}: another --seed, or raise --kills")
    return kills


def terminate(place: Path, arguments: Any, problems: list[str]) -> list[dict[str, Any]]:
    """SIGTERM at random moments of one run, each followed by a restart, and at last to its end."""
    rng = random.Random(arguments.seed + 1)
    rows = []
    for i in range(arguments.terms):
        child = Child(place, "terminated", arguments.processes)
        target = int(arguments.steps * 0.9 * (i + rng.random()) / arguments.terms)
        child.wait_until(lambda child=child, target=target: child.step is not None and child.step >= target)
        time.sleep(rng.uniform(0, 0.3))
        sent, busy = time.monotonic(), bool(child.saving())
        child.send(signal.SIGTERM, rng)
        status, ended = child.end(), time.monotonic()
        row = {
            "step": child.step,
            "while_saving": busy,
            "from_signal": round(ended - sent, 2),
            "from_end_of_step": round(ended - child.last_step_line, 2),
        }
        rows.append(row)
        print(
            f"SIGTERM at step {child.step}{' while saving' if busy else ''}: gone {row['from_signal']} s after the signal, "
            f"{row['from_end_of_step']} s after the end of the step",
            flush=True,
        )
        if status or child.step not in whole(child.workdir) or temporary(child.workdir):
            problems.append(f"SIGTERM at step {child.step}: status {status}, checkpoints {whole(child.workdir)}")
        if row["from_end_of_step"] > arguments.limit:
            problems.append(f"SIGTERM at step {child.step}: {row['from_end_of_step']} s, more than {arguments.limit:g} s")
    if rows:
        Child(place, "terminated", arguments.processes).finish("the last start after SIGTERM")
    return rows


def losses(workdir: Path) -> list[tuple[Any, ...]]:
    """(step, loss and whatever else is no measurement of time, as written) of every training line, in order."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], {k: v for k, v in line.items() if k not in TIMED}) for line in lines if "loss" in line]


def arrays(workdir: Path, step: int) -> dict[str, Any]:
    """Every array of a checkpoint by item and path."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)  # an item has no metadata of its own, which is no mistake
    found = {}
    for item in ("params", "ema", "optimizer"):
        directory = workdir / "checkpoints" / str(step) / item
        with ocp.PyTreeCheckpointer() as reader:
            shape = reader.metadata(directory).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shape)
            tree = reader.restore(directory, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        found |= {item + jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return found


def compare(workdir: Path, other: Path, problems: list[str]) -> dict[str, int]:
    """Everything that two finished runs leave, bit by bit; counts of what was compared and of what differs."""
    counts = {"checkpoints": 0, "arrays": 0, "numbers": 0, "losses": 0, "differences": 0}
    wrong: list[str] = []
    if whole(workdir) != whole(other):
        wrong.append(f"checkpoints {whole(workdir)} and {whole(other)}")
    for step in sorted(set(whole(workdir)) & set(whole(other))):
        ours, theirs = arrays(workdir, step), arrays(other, step)
        if ours.keys() != theirs.keys():
            wrong.append(f"checkpoint {step}: other arrays")
        for name in ours.keys() & theirs.keys():
            a, b = ours[name], theirs[name]
            if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
                wrong.append(f"checkpoint {step}: {name}")
            counts["numbers"] += a.size
        counts["arrays"] += len(ours)
        counts["checkpoints"] += 1
    ours, theirs = losses(workdir), losses(other)
    counts["losses"] = len(ours)
    if ours != theirs:
        where = next((a[0] for a, b in zip(ours, theirs, strict=False) if a != b), "one has more lines")
        wrong.append(f"metrics.jsonl, first at step {where}")
    for leftover in (*temporary(workdir), *(path.name for path in workdir.glob(".*"))):
        wrong.append(f"half-written {leftover} stays")
    counts["differences"] = len(wrong)
    problems += [f"{workdir.name}: {what}" for what in wrong]
    return counts


def next_batches(place: Path, step: int, steps: int) -> tuple[list[str], list[str]]:
    """Digests of the three batches after `step`: from a stream begun there, and from one that ran from the start."""
    from jaxgen import config as configs
    from jaxgen.data.pipeline import batches, load_source

    config = configs.load(str(place / "whole.py"), [])

    def digests(name: str, start: int, count: int) -> list[str]:
        source = load_source(configs.load(str(place / f"{name}.py"), []).data)
        settings = {"seed": config.seed, "batch_size": config.train.batch_size, "caption_dropout": config.text.dropout}
        stream = batches(source, start_step=start, **settings)
        found = []
        for _ in range(count):
            batch = next(stream)
            found.append(hashlib.sha256(batch["image"].tobytes() + "\n".join(batch["caption"]).encode()).hexdigest())
        return found

    return digests("killed", step, 3), digests("whole", 0, steps + 3)[-3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--during_saves", type=int, default=5, help="at least so many of them while a save is under way")
    parser.add_argument("--terms", type=int, default=5, help="how often SIGTERM is tried")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--processes", type=int, default=1, help="of a run")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--limit", type=float, default=10, help="seconds from the end of a step to the saved exit on SIGTERM")
    parser.add_argument("--dir", help="keep everything here (default: a temporary directory, removed at the end)")
    parser.add_argument("--json", help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxgen-resume-") as scratch:
        report = measure(Path(arguments.dir or scratch).resolve(), arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(report["problems"]))


def measure(place: Path, arguments: Any) -> dict[str, Any]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxgen.parallel import runtime

    runtime.start(allow_cpu=True)  # this process writes the encoder, and reads at last what the runs have left
    began = time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    for name in ("whole", "killed", "terminated"):
        if (place / name).exists():
            sys.exit(f"{place / name} exists: choose an empty --dir")
        # The killed run prepares its own pictures and caption table, so that kills meet that too.
        data = place / ("data_killed" if name == "killed" else "data")
        values = {"data": str(data), "text": str(place / "text"), "steps": arguments.steps, "every": arguments.every}
        values["width"] = WIDTHS[arguments.processes > 1]
        (place / f"{name}.py").write_text(CONFIG.format(**values))
    write(place / "text", scene_captions(("en",)))  # an encoder that takes no time to load
    problems: list[str] = []

    child = Child(place, "whole", arguments.processes)
    child.finish("the run nobody touches")
    saves = sorted(child.saves) or [0.0]
    usual = {**child.times, "save": saves[len(saves) // 2]}
    print(
        f"untouched: {arguments.steps} steps in {time.monotonic() - began:.0f} s; first step after "
        f"{usual['first step']:.1f} s (nothing compiled before), a save takes {usual['save']:.2f} s",
        flush=True,
    )
    kills = kill_and_restart(place, arguments, usual, problems)
    terms = terminate(place, arguments, problems)

    compared = {name: compare(place / name, place / "whole", problems) for name in ("killed", "terminated")[: 1 + bool(terms)]}
    reached = max(whole(place / "killed"), default=0)
    resumed, straight = next_batches(place, reached, arguments.steps)
    if reached != arguments.steps or resumed != straight:
        problems.append(f"the three batches after step {reached} are not those after step {arguments.steps}")

    if arguments.processes > 1 and kills:
        print(f"\nof {arguments.processes} processes the others ended at most {max(row['all_gone'] for row in kills)} s after")
    phases = [row["phase"] for row in kills]
    print(f"\n{'kills':12s}" + "".join(f"{phase:>12s}" for phase in sorted(set(phases))))
    print(f"{len(kills):<12d}" + "".join(f"{phases.count(phase):12d}" for phase in sorted(set(phases))))
    print(f"\n{'run':12s}" + "".join(f"{name:>12s}" for name in next(iter(compared.values()))))
    for name, counts in compared.items():
        print(f"{name:12s}" + "".join(f"{count:12d}" for count in counts.values()))
    print(f"\nnext batches {'identical' if resumed == straight else 'DIFFERENT'}: {', '.join(d[:12] for d in resumed)}")
    if terms:
        longest = max(row["from_end_of_step"] for row in terms)
        print(f"SIGTERM: {len(terms)} times, at most {longest} s from the end of the step to the saved exit")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    seconds = round(time.monotonic() - began)
    print(f"{'FAILED' if problems else 'exact'} in {seconds} s")
    return {
        "kills": kills,
        "phases": {phase: phases.count(phase) for phase in sorted(set(phases))},
        "sigterm": terms,
        "compared": compared,
        "next_batches": {"resumed": resumed, "uninterrupted": straight},
        "usual_seconds": {name: round(value, 2) for name, value in usual.items()},
        "problems": problems,
        "settings": vars(arguments),
        "cores": os.cpu_count(),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
