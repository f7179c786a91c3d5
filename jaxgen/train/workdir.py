"""Whose a workdir is: a run may go on in it with what changes none of its numbers."""

import os
from typing import Any

import jax

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.storage import Path, explain, is_remote, sweep
from jaxgen.train.checkpoints import Checkpoints, read_config
from jaxgen.train.logging import tell
from jaxgen.train.optimizers import same_until

# What may differ between the command that began a run and the one that goes on: none of it changes a step's numbers.
MAY_CHANGE = (
    "mesh.",
    "sample.",
    "eval.",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "data.dir",
    "data.source",
    "data.threads",
    "data.keep_in_memory",
    "data.max_bad",
    "data.max_bad_shards",
    "family.codec.source",  # moved; that it is the same one is seen by its fingerprint
)


def claim(workdir: Path, config: Any) -> None:
    """Makes the directory, or clears it of what a killed run had begun to write; raises UserError where it cannot be written
    or holds another run's checkpoints."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise explain(error, workdir) from error
    if not is_remote(workdir) and not os.access(workdir, os.W_OK):
        raise UserError(f"no permission to write {workdir}: choose a directory of your own")
    previous = read_config(workdir)
    steps = Checkpoints(workdir, keep=None).steps() if previous is not None else []
    if previous is not None and steps:  # else it came to nothing
        check_same(workdir, previous, config, max(steps))
    if jax.process_index() == 0:
        for directory in (workdir, workdir / "samples"):
            sweep(directory)


def check_same(workdir: Path, previous: dict[str, Any], config: Any, step: int) -> None:
    """Raises UserError where the directory's config.json says something else, for what a run at this step hangs on."""
    there = configs.from_dict(type(config), previous, f"{workdir}/config.json")  # what is newer has its default
    lengths = there.train.steps, config.train.steps
    alike = lambda: not config.text.adapt.scheduled and same_until(config.optimizer, *lengths, step)  # noqa: E731
    changed = [
        f"{name} ({old} there, {new} here)"
        for name, old, new in configs.differences(configs.to_dict(there), configs.to_dict(config))
        if not name.startswith(MAY_CHANGE) and not (name == "train.steps" and alike())
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. Choose another --workdir, or change "
            f"only what may differ: {', '.join(name.rstrip('.') for name in MAY_CHANGE)} (and train.steps where the rate up to "
            f"step {step} stays the same: optimizer.schedule=constant, or trapezoid before its fall)"
        )


def is_finished(config: Any, workdir: Path, step: int, control: dict[str, Any]) -> bool:
    """Whether a run has nothing left to do, which is told."""
    done = step >= config.train.steps or control["stopped"]
    if done:
        tell(f"{workdir} is finished (step {step}); raise train.steps or choose another --workdir")
    return done


def traced_from(config: Any) -> dict[str, Any]:
    """The fields of a configuration that a step can hang on; for the mesh and its devices see KeptProgram."""

    def chosen(fields: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            name: chosen(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in fields.items()
            if not f"{prefix}{name}".startswith(MAY_CHANGE)
        }

    return chosen(configs.to_dict(config), "")
