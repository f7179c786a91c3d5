"""Checkpoints with Orbax: written beside the training, whole or not at all, the last few and the best kept."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxgen.errors import UserError
from jaxgen.storage import Path, explain, first_line, is_full, is_remote
from jaxgen.train.state import TrainState

FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"  # how Orbax names a checkpoint until it is whole
# Devices with copies of the same array share its writing only from this size on: below it, cutting an array into their parts,
# for which a program is compiled for every shape there is, takes longer than writing it.
SHARED_BYTES = 2**22


class Checkpoints:
    """The checkpoints of a workdir: separate items params, ema, optimizer and meta, one directory a step."""

    def __init__(self, workdir: Path, keep: int | None = 3, score: Callable[[dict[str, float]], float] | None = None):
        """Keeps the last `keep` (None: only reads) and the one whose metrics have the highest `score`."""
        self.directory = workdir / "checkpoints"
        self._failed = False
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what was asked for
        options = ocp.CheckpointManagerOptions(read_only=True)
        if keep is not None:
            writes = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_BYTES)
            ocp.type_handlers.register_type_handler(jax.Array, writes, override=True)
            policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep)]
            if score is not None:
                policies.append(ocp.checkpoint_managers.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False))
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # what a kill in the middle of a save has left
            )
        self._reads_only = keep is None
        # Orbax refuses to write arrays below a relative path.
        directory = os.fspath(self.directory) if is_remote(self.directory) else os.path.abspath(self.directory)
        self._manager = ocp.CheckpointManager(directory, options=options)
        writer = self._manager._checkpointer
        self._writers = [writer.wait_until_finished] if isinstance(writer, ocp.AsyncCheckpointer) else []

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Start writing; training may go on with the arrays meanwhile. A state that failed is never written.

        A full disk is told and survived: the checkpoints before stay as they are."""
        step = int(state.step)
        if int(state.control["failed"]) >= 0:
            raise ValueError(f"step {state.control['failed']} was not finite; its state is not to be saved")
        self.wait()
        if step in self._manager.all_steps():
            return
        items = {
            "params": ocp.args.StandardSave(state.params),
            "ema": ocp.args.StandardSave(state.ema_params),
            "optimizer": ocp.args.StandardSave(_plain(state.opt_state)),
            "meta": ocp.args.JsonSave({"format": FORMAT, "step": step, **meta}),
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        except (OSError, ValueError, RuntimeError) as error:
            self._tell(error)

    def wait(self) -> bool:
        """Until what is being written is on disk; False where it could not be written (told on stderr)."""
        errors = []
        # The manager and what writes for it keep an error each: one that is not taken now would be the next save's.
        for finish in (self._manager.wait_until_finished, *self._writers):
            try:
                finish()
            except Exception as error:  # Orbax hands on whatever its threads met
                errors.append(error)
        if errors:
            self._tell(errors[0])
        return not errors

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest state that can be read, laid out as `abstract` (ShapeDtypeStructs with shardings), and its meta."""

        def read(step: int) -> tuple[TrainState, dict[str, Any]]:
            items = {
                "params": ocp.args.StandardRestore(abstract.params),
                "ema": ocp.args.StandardRestore(abstract.ema_params),
                "optimizer": ocp.args.StandardRestore(_plain(abstract.opt_state)),
                "meta": ocp.args.JsonRestore(),
            }
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            leaves = jax.tree.leaves(found["optimizer"])
            optimizer = jax.tree.unflatten(jax.tree.structure(abstract.opt_state), leaves)
            place = lambda like, value: jax.device_put(np.asarray(value, like.dtype), like.sharding)  # noqa: E731
            state = TrainState(
                step=place(abstract.step, found["meta"]["step"]),
                params=found["params"],
                ema_params=found["ema"],
                opt_state=optimizer,
                control=jax.tree.map(lambda like: place(like, -1), abstract.control),
            )
            return state, found["meta"]

        return self._newest(read)

    def restore_ema(self, abstract: Any | None = None) -> tuple[Any, dict[str, Any]] | None:
        """The newest EMA weights alone and their meta: what drawing needs."""

        def read(step: int) -> tuple[Any, dict[str, Any]]:
            items = {"ema": ocp.args.StandardRestore(abstract), "meta": ocp.args.JsonRestore()}
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            return found["ema"], found["meta"]

        return self._newest(read)

    def restore_params(self) -> tuple[Any, dict[str, Any]] | None:
        """The newest weights as they were trained, on one device, whatever mesh and family wrote them, and their meta."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def read(step: int) -> tuple[Any, dict[str, Any]]:
            saved = self._manager.item_metadata(step)["params"]
            abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
            items = {"params": ocp.args.StandardRestore(abstract), "meta": ocp.args.JsonRestore()}
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
            return found["params"], found["meta"]

        return self._newest(read)

    def close(self) -> None:
        self.wait()
        self._manager.close()
        if not self._reads_only:
            self._clear()  # again: what a thread of a failed save still wrote after the first time

    def _newest(self, read: Any) -> Any:
        steps = self.steps()
        reason = ""
        for step in reversed(steps):
            try:
                value = read(step)
            except Exception as error:  # a damaged file shows itself in many ways
                reason = first_line(error)[:160]
                print(f"warning: checkpoint {step} in {self.directory} cannot be read ({reason})", file=sys.stderr)
                continue
            if step != steps[-1]:
                print(f"warning: going back to checkpoint {step}", file=sys.stderr)
                # What is newer is broken; Orbax would refuse to write its steps again.
                for broken in [] if self._reads_only else steps[steps.index(step) + 1 :]:
                    self._manager.delete(broken)
            return value
        if steps:
            raise UserError(
                f"{self.directory}: none of the checkpoints {steps} can be read ({reason}); choose another --workdir"
            )
        return None

    def _tell(self, error: BaseException) -> None:
        system = error if isinstance(error, OSError) else None
        cause = error.__cause__ or error.__context__
        if system is None and isinstance(cause, OSError):
            system = cause
        if system is not None or is_full(error):
            line = str(explain(system or error, self.directory))
        else:
            line = f"cannot write {self.directory}: {first_line(error)[:200]}"
        print(f"warning: checkpoint not saved: {line}", file=sys.stderr, flush=True)
        self._failed = True
        self._clear()

    def _clear(self) -> None:
        """Takes away what there is of checkpoints that failed: it takes space, which is scarce."""
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                for half_written in self.directory.glob(f"*{TEMPORARY}"):
                    half_written.rmtree()

    @property
    def failed(self) -> bool:
        """Whether a save has failed since this was asked last."""
        failed, self._failed = self._failed, False
        return failed


def _plain(opt_state: Any) -> dict[str, Any]:
    """Optimizer states are nested named tuples: numbered leaves keep their order and survive renames of types."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(opt_state))}


def read_config(workdir: Path) -> dict[str, Any] | None:
    """config.json of a workdir, or None."""
    try:
        return json.loads((workdir / "config.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{workdir}/config.json is no valid JSON ({error}); choose another --workdir") from None
