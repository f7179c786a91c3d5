"""The loop of a run: steps, what is told and looked at between them, checkpoints, and the end, whoever asks for it."""

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.nn.module import Params
from jaxgen.parallel.kept import KeptProgram, hits
from jaxgen.parallel.memory import Checked, bytes_a_device, checked, compile_checked
from jaxgen.parallel.mesh import on_mesh, replicated
from jaxgen.parallel.runtime import steady_memory
from jaxgen.storage import Path, as_path, is_remote, write_bytes
from jaxgen.train.checkpoints import Checkpoints
from jaxgen.train.evaluation import keep_best
from jaxgen.train.goodput import Goodput
from jaxgen.train.logging import Log, duration, peak_flops, progress_line, tell
from jaxgen.train.state import TrainState
from jaxgen.train.step import Step
from jaxgen.train.stopping import stopping


def fit(
    config: Any,
    workdir: Path,
    step_fn: Step,
    state: TrainState,
    frozen: Params,
    feed: Iterator[Any],
    *,
    where: Any,
    kept: KeptProgram,
    checkpoints: Checkpoints,
    control: dict[str, Any],
    marks: dict[str, Any],
    flops: Callable[[Any], float],
    evaluate: Callable[[TrainState], dict[str, float]],
    draw: Callable[[TrainState, int, Log], None] | None,
    use: str,
    began: float,
    unit: str = "images",
    profile: bool = False,
) -> TrainState:
    """The loop of a run from a state laid out as `where`, whose arrays it takes over, on batches of `feed`: the last state.

    config: has the sections train, sample, eval and mesh. marks: of what the state belongs to, kept with each checkpoint.
    flops: of one example of a batch in a step. draw: what is looked at every sample.every steps. use: what a finished run is
    for. unit: what an example is called. began: when the run did, by time.monotonic."""
    step = first = int(state.step)
    batch = next(feed)
    compiling = time.monotonic()
    programs = Programs(jitted(step_fn, where), config, jax.tree.leaves(where)[0].mesh, kept, json.dumps(marks))
    used = programs(state, frozen, batch).memory
    compile_s = time.monotonic() - compiling

    # Loop
    log = Log(workdir, step, configs.to_dict(config))
    clock = Goodput(began, control["spent"], log.last)
    log.write(step, {"compile_s": compile_s, "peak_memory_bytes": used, "startup_s": time.monotonic() - began, **clock.told()})
    hush_writers()
    trace = Trace(workdir, first + 10) if profile else None
    metrics: dict[str, jax.Array] = {}

    def save(metrics: dict[str, float] | None = None) -> None:
        clock.to("save")
        control["spent"] = clock.seconds()
        log.flush()
        meta = {"control": control, **marks, "config": configs.to_dict(config)}
        checkpoints.wait()
        _ = checkpoints.failed  # an earlier failure has been told: whether the run ends well, its last checkpoint decides
        checkpoints.save(state, meta, metrics)
        clock.to("step")

    def stop_if_failed(metrics: dict[str, Any]) -> None:
        if int(metrics["failed"]) >= 0:
            log.flush()
            checkpoints.close()
            raise UserError(
                # Steps are counted from one here, as in metrics.jsonl.
                f"the loss or gradient of step {int(metrics['failed']) + 1} is not finite; nothing of it was saved. "
                "Lower optimizer.learning_rate or optimizer.clip_norm and go on from the last checkpoint in another --workdir"
                " (train.init_from)"
            )

    with steady_memory(), stopping() as asked_to_stop:
        clock.to("step")
        since, since_step, done_flops = time.monotonic(), step, 0.0
        while step < config.train.steps and not control["stopped"]:
            if metrics:
                # One step in flight besides the running one: enough to hide the host's work, and no pile-up on a CPU.
                jax.block_until_ready(metrics["loss"])
            done_flops += flops(batch) * config.train.batch_size
            clock.to("restart")  # a shape that has not come before is compiled now
            program = programs(state, frozen, batch).program
            clock.to("step")
            state, metrics = program(state, frozen, batch)
            step += 1
            if trace is not None:
                trace.at(step, metrics)
            last, stops = step == config.train.steps, asked_to_stop(step)
            if not (last or stops):
                batch = next(feed)
            if step % config.train.log_every == 0 or last or stops:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                stop_if_failed(values)
                now = time.monotonic()
                ms = (now - since) * 1000 / (step - since_step)
                rate = done_flops / (now - since)
                values |= {"step_ms": ms, f"{unit}_per_sec": config.train.batch_size * 1000 / ms, "gflops": rate / 1e9}
                peak = peak_flops()
                if peak is not None:
                    values["mfu"] = rate / (peak * jax.device_count())
                values.pop("failed")
                log.write(step, values | clock.told())
                tell(progress_line(step, config.train.steps, values))
                since, since_step, done_flops = time.monotonic(), step, 0.0
            scores = None
            clock.to("look")
            if config.eval.every and (step % config.eval.every == 0 or last) and not stops:
                stop_if_failed(metrics)
                scores = evaluate(state)
                log.write(step, scores)
                tell(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in scores.items()))
                keep_best(control, config, scores)
            if draw is not None and (step % config.sample.every == 0 or last) and not stops:
                stop_if_failed(metrics)
                draw(state, step, log)
            clock.to("step")
            if step % config.train.checkpoint_every == 0 or last or stops or scores is not None:
                stop_if_failed(metrics)
                save(scores)
            if scores is not None or step % config.sample.every == 0:
                since, since_step, done_flops = time.monotonic(), step, 0.0
            if stops:
                break
        clock.to("save")
        done = checkpoints.wait() and not checkpoints.failed
    log.flush()
    checkpoints.close()
    if trace is not None:
        trace.close()
    if not done:
        raise UserError(f"the last checkpoint of {workdir} could not be written (see above); run the same command again")
    if step < config.train.steps and not control["stopped"]:
        tell(f"stopped at step {step} and saved; the same command goes on from here")
    else:
        spent, share = sum(clock.seconds().values()), clock.told()["goodput"]
        why = f": {config.eval.metric} has not improved for {config.eval.patience} evaluations" if control["stopped"] else ""
        tell(f"finished at step {step} after {duration(spent)} ({share:.0%} of it in steps){why}; {use}")
    return state


def jitted(step: Step, where: Any) -> Any:
    """The step as it is compiled, for a state laid out as `where`, whose arrays it takes over."""
    mesh = jax.tree.leaves(where)[0].mesh
    return jax.jit(on_mesh(mesh, step), donate_argnums=0, out_shardings=(where, replicated(mesh)))


class Programs:
    """The compiled step, one for each shape of batch that comes; the first may be kept from an earlier start with the same
    marks. Raises UserError where one does not fit into memory."""

    def __init__(self, step: Any, config: Any, mesh: Mesh, kept: KeptProgram, marks: str):
        self._step, self._config, self._mesh, self._kept, self._marks = step, config, mesh, kept, marks
        self._compiled: dict[Any, Checked] = {}

    def __call__(self, state: TrainState, frozen: Params, batch: Any) -> Checked:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            began, arguments = time.monotonic(), (state, frozen, batch)
            known = self._config, self._mesh, bytes_a_device((state, frozen))
            found = None if self._compiled else self._kept.get(arguments, self._marks)
            if found is not None:
                made = checked(found, *known)
            else:
                with hits() as read:
                    made = compile_checked(self._step.lower(*arguments), *known)
                # What JAX has read from its cache XLA cannot write again: its functions would be missing.
                if not (self._compiled or read):
                    self._kept.keep(made.program, arguments, self._marks)
            self._compiled[shapes] = made
            how = "compiled" if found is None else "taken from an earlier start"
            tell(f"{how} in {time.monotonic() - began:.1f} s; {made.memory / 2**30:.2f} GiB a device")
        return self._compiled[shapes]


def hush_writers() -> None:
    """From now on a write that fails is told once, by Checkpoints, and not by a traceback of each of Orbax's threads."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    shown = sys.unraisablehook

    def hook(raised: Any) -> None:
        # TensorStore's callbacks into the event loop of a write that has been given up.
        if str(raised.exc_value) != "Event loop is closed":
            shown(raised)

    sys.unraisablehook = hook


class Trace:
    """A profiler trace of ten steps into workdir/profile; for a remote one it is written here and copied whole."""

    def __init__(self, workdir: Path, start: int):
        self._target, self._start, self._on = workdir / "profile", start, False
        self._directory = tempfile.mkdtemp(prefix="jaxgen-profile-") if is_remote(workdir) else os.fspath(self._target)

    def at(self, step: int, metrics: Any) -> None:
        if step == self._start:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self._directory)
            self._on = True
        elif step == self._start + 10:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
            for directory, _, files in os.walk(self._directory) if is_remote(self._target) else ():
                for file in files:
                    path = os.path.join(directory, file)
                    write_bytes(self._target / os.path.relpath(path, self._directory), as_path(path).read_bytes())
            tell(f"profile in {self._target}")
