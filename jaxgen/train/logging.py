"""What a run tells: metrics.jsonl, TensorBoard, Weights & Biases where it is set up, and a line on the screen."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxgen.errors import NoSpace
from jaxgen.parallel.devices import known
from jaxgen.storage import Path, as_path, explain, is_remote, write_text

INTERVAL = {False: 1.0, True: 60.0}  # seconds between rewrites of a local and of a remote metrics.jsonl


class MetricsLog:
    """metrics.jsonl, a JSON object a line; opening it at a step drops the lines beyond that step.

    The file is always written whole: object stores cannot append."""

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / "metrics.jsonl"
        self._written = float("-inf")
        self._lines: list[str] = []
        self.last: dict[str, Any] = {}  # of the lines found, the dropped ones too, the last that tells of goodput
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    values = json.loads(line)
                    if "goodput" in values:
                        self.last = values
                    if values["step"] <= step:
                        self._lines.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a crash on a file system without atomic writes
            self.flush()

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._lines.append(json.dumps({"step": step, **values}))
        if time.monotonic() - self._written > INTERVAL[is_remote(self.path)]:
            self.flush()

    def flush(self) -> None:
        write_text(self.path, "".join(line + "\n" for line in self._lines))
        self._written = time.monotonic()


class TensorBoard:
    """Event files in the workdir without TensorFlow; for a remote one they are written here and copied whole.

    tensorboardX's own writer hands events to a thread that a full disk ends, and then waits for it for ever: so they are
    written here, into a new file after one that was refused."""

    def __init__(self, workdir: Path, step: int):
        self._remote = workdir / "tensorboard" if is_remote(workdir) else None
        local = tempfile.mkdtemp(prefix="jaxgen-events-") if self._remote else os.fspath(workdir / "tensorboard")
        self._local, self._step = as_path(local), step
        self._writer: Any = None
        self._flushed = float("-inf")

    def write(self, step: int, values: dict[str, Any]) -> None:
        from tensorboardX import summary

        for name, value in values.items():
            if isinstance(value, int | float):
                self._add(step, summary=summary.scalar(name if "/" in name else f"train/{name}", value))

    def image(self, step: int, name: str, image: Any) -> None:
        from tensorboardX import summary

        self._add(step, summary=summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        if self._writer is not None:
            self._guarded(self._writer.flush)
        if self._remote is not None and self._local.exists():
            for file in self._local.iterdir():
                (self._remote / file.name).parent.mkdir(parents=True, exist_ok=True)
                (self._remote / file.name).write_bytes(file.read_bytes())

    def _add(self, step: int, **what: Any) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # ty: ignore[missing-module-member]  (made at run time)

        def write() -> None:
            if self._writer is None:
                self._local.mkdir(parents=True, exist_ok=True)
                self._writer = EventsWriter(os.fspath(self._local / "events"))
                if self._step:  # what an earlier start told of later steps does not count
                    start = SessionLog(status=SessionLog.START)
                    self._writer.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
            self._writer.write_event(Event(wall_time=time.time(), step=step, **what))
            if time.monotonic() - self._flushed > 30:  # somebody may be watching
                self._writer.flush()
                self._flushed = time.monotonic()

        self._guarded(write)
        self._step = step

    def _guarded(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            if self._writer is not None:
                with contextlib.suppress(OSError):
                    self._writer.close()
            self._writer = None
            raise explain(error, self._local) from error


class WandB:
    """Weights & Biases, where the package is installed and WANDB_API_KEY or WANDB_MODE is set; never in the way."""

    def __init__(self, workdir: Path, config: dict[str, Any]):
        self._run: Any = None
        if not ({"WANDB_API_KEY", "WANDB_MODE"} & os.environ.keys()):
            return
        try:
            import wandb  # ty: ignore[import-not-found]

            self._run = wandb.init(project="jaxgen", name=workdir.name, id=workdir.name, resume="allow", config=config)
        except Exception as error:
            print(f"warning: no Weights & Biases ({error})")

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self._run is not None:
            self._run.log(values, step=step)


class Log:
    """All of them at once; on processes other than 0 it does nothing."""

    def __init__(self, workdir: Path, step: int, config: dict[str, Any]):
        self._sinks: list[Any] = []
        self._refused: set[Any] = set()  # those that a full disk refused last
        self.last: dict[str, Any] = {}  # MetricsLog's
        if jax.process_index() == 0:
            metrics = MetricsLog(workdir, step)
            self.last = metrics.last
            self._sinks = [metrics, TensorBoard(workdir, step), WandB(workdir, config)]

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._all("write", step, values)

    def image(self, step: int, name: str, image: Any) -> None:
        self._all("image", step, name, image)

    def flush(self) -> None:
        self._all("flush")

    def _all(self, act: str, *told: Any) -> None:
        """A full disk does not end a run: it is told once, and metrics.jsonl is made up for when there is space again."""
        for sink in self._sinks:
            try:
                getattr(sink, act, lambda *_: None)(*told)
                self._refused.discard(sink)
            except NoSpace as error:
                if sink not in self._refused:
                    print(f"warning: metrics not written: {error}", file=sys.stderr, flush=True)
                self._refused.add(sink)


def peak_flops() -> float | None:
    """Dense bfloat16 peak of one device, None where it is not known."""
    device = known(jax.devices()[0].device_kind)
    return device and device.flops


def tell(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def progress_line(step: int, steps: int, values: dict[str, Any]) -> str:
    """What the screen shows: step, loss, speed, time left."""
    left = (steps - step) * values["step_ms"] / 1000
    speed = f"MFU {values['mfu']:.1%}" if "mfu" in values else f"{values['gflops']:.0f} GFLOP/s"
    unit, rate = next((name.removesuffix("_per_sec"), value) for name, value in values.items() if name.endswith("_per_sec"))
    return f"step {step}/{steps}  loss {values['loss']:.4f}  {rate:.0f} {unit}/s  {speed}  {duration(left)} left"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
