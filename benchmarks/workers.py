"""Sides of a benchmark, each in a process and an interpreter of its own, that take turns.

A side is an object whose methods answer commands. One that a command prepares, by the name of its kind of work, returns
(run, show): `run()` does the work until its result is there, `show(result)` is the array that is compared."""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
Work = tuple[Callable[[], Any], Callable[[Any], np.ndarray]]


class Skip(Exception):
    """Why a side cannot do a case."""


def serve(side: Any) -> None:
    """Answer commands, a JSON object a line each, until the input ends."""
    out, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print is no answer
    works: dict[str, Work] = {}
    for line in sys.stdin:
        command = json.loads(line)
        name, variant = command.pop("do"), command.pop("variant", "")
        answer: dict[str, Any] = {}
        try:
            if name == "time":
                run = works[variant][0]
                began = time.perf_counter()
                for _ in range(command["count"]):
                    run()
                answer["seconds"] = (time.perf_counter() - began) / command["count"]
            elif name == "show":
                run, show = works[variant]
                np.save(command["file"], show(run()))
            elif name == "prepare":
                works.pop(variant, None)
                works[variant] = getattr(side, command.pop("kind"))(variant, **command)
            else:
                answer = getattr(side, name)(**command) or {}
        except Skip as reason:
            answer["skip"] = str(reason)
        print(json.dumps(answer), file=out, flush=True)


class Worker:
    """A side's process."""

    def __init__(self, command: list[str], environment: dict[str, str], errors: Path):
        self.errors = errors
        with open(errors, "w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
            )
        self._commands: Any = self.process.stdin
        self._answers: Any = self.process.stdout

    def ask(self, **command: Any) -> dict[str, Any]:
        try:
            print(json.dumps(command), file=self._commands, flush=True)
            line = self._answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            sys.exit(f"{self.process.args} ended on {str(command)[:200]}\n{self.errors.read_text()[-3000:]}")
        return json.loads(line)

    def end(self) -> None:
        self._commands.close()
        self.process.wait()


def environment(place: Path) -> dict[str, str]:
    """Of all sides: compiled programs are kept at `place`, freed memory with the process, and nothing is fetched."""
    ours = ("XLA_FLAGS", "NPROC", "JAXGEN_CPU_DEVICES")
    return {name: value for name, value in os.environ.items() if name not in ours} | {
        "JAX_COMPILATION_CACHE_DIR": str(place / "xla"),
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        # As runtime.keep_memory: without it the kernel clears the pages of a large array anew each time.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**62),
    }


def race(
    side: Callable[[Any], Worker], variants: tuple[Any, ...], rounds: int, seconds: float | None
) -> dict[Any, list[float]]:
    """Seconds of one run of each prepared variant, a number a round, in rotating order. side: whose a variant is. seconds: what
    a variant runs for in a round, warmed by a run that does not count; None: it runs once, cold."""
    counts = {}
    for variant in variants if seconds else ():
        took = min(side(variant).ask(do="time", variant=str(variant), count=1)["seconds"] for _ in range(2))
        counts[variant] = max(1, round(seconds / took))
    found: dict[Any, list[float]] = {variant: [] for variant in variants}
    for variant in rotated(variants, rounds):
        if seconds:
            side(variant).ask(do="time", variant=str(variant), count=1)  # another side's data were in the caches
        answer = side(variant).ask(do="time", variant=str(variant), count=counts.get(variant, 1))
        found[variant].append(answer["seconds"])
    return found


def rotated(variants: tuple[Any, ...], rounds: int) -> Any:
    turns = itertools.cycle([variants[i:] + variants[:i] for i in range(len(variants))])
    return itertools.chain.from_iterable(itertools.islice(turns, rounds))


def median(values: list[float]) -> float:
    return float(np.median(values))


def versions(python: str | None, packages: tuple[str, ...], parser: argparse.ArgumentParser) -> str:
    """What stands against us; ends the program where the interpreter is none or lacks a package."""
    if not python:
        parser.error(f"--torch_python is missing: an interpreter with {' and '.join(packages)} in it")
    told = ", ".join(f"{name} {{{name}.__version__}}" for name in packages)
    try:
        done = subprocess.run([python, "-c", f"import {', '.join(packages)}; print(f'{told}')"], capture_output=True, text=True)
    except OSError as error:
        parser.error(f"--torch_python: {error}")
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        parser.error(f"--torch_python={python}: {' '.join(last)}; `{python} -m pip install {' '.join(packages)}`")
    return done.stdout.strip()
