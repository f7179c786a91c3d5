"""Whether a compiled step fits into its devices, and what to change where it does not."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxgen.errors import UserError


class Checked(NamedTuple):
    """A compiled step that fits, and bytes a device: at its peak, what it is given included; of what it is given (state and
    batch); that it may take, where that is known."""

    program: Any
    memory: int
    given: int
    limit: float | None


def compile_checked(lowered: Any, config: Any, mesh: Mesh, held: int, limit: float | None = None) -> Checked:
    """The step, compiled. Raises UserError with what to change where it takes more memory than a device has.

    config: has the sections train and mesh. held: bytes a device of what the step is given besides a batch. limit: bytes a
    device; by default what this machine's devices have."""
    try:
        compiled = lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, there = told(str(error), held) or (None, limit)
        raise UserError(too_large(config, mesh, held, needed, there)) from None
    return checked(compiled, config, mesh, held, limit)


def checked(compiled: Any, config: Any, mesh: Mesh, held: int, limit: float | None = None) -> Checked:
    """What compile_checked does once it has compiled."""
    m = compiled.memory_analysis()  # which takes a quarter of a second for thousands of kernels
    given = m.argument_size_in_bytes
    used = given + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    there = limit if limit is not None else free_memory(mesh, given)
    if there is not None and used > there:
        raise UserError(too_large(config, mesh, held, used, there))
    return Checked(compiled, used, given, there)


def told(error: str, held: int) -> tuple[float, float] | None:
    """Bytes a device that are needed and that are there, by the words of a compiler that ran out; None for unknown words."""
    used = re.search(r"Used ([\d.]+)([MGT]) of ([\d.]+)([MGT]) hbm", error)
    more = re.search(r"\(([\d.]+)([MGT])\) exceeds available HBM \(([\d.]+)([MGT])\)", error)  # on top of what it is given
    found = used or more
    if found is None:
        return None
    sizes = {"M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
    needed, there = (float(found.group(i)) * sizes[found.group(i + 1)] for i in (1, 3))
    return (needed if used else needed + held), there


def bytes_a_device(tree: Any) -> int:
    """Of arrays, or jax.ShapeDtypeStructs, with their shardings."""
    leaves = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * size for shape, size in leaves)


def free_memory(mesh: Mesh, given: int) -> float | None:
    """Bytes a device that a step may take, those that it is given, which lie there already, included; None where that is not
    known."""
    devices = mesh.local_devices
    stats = devices[0].memory_stats() if hasattr(devices[0], "memory_stats") else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text()) if file.exists() else None
    if devices[0].platform != "cpu" or found is None:
        return None
    return int(found.group(1)) * 1024 / len(devices) + given


def too_large(config: Any, mesh: Mesh, held: int, needed: float | None, limit: float | None) -> str:
    """The line that says so, with values to try, those first that change nothing else."""
    gib, batch, parts = 2**30, config.train.batch_size, config.train.accumulate
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    wider = mesh.shape["fsdp"] * 2
    divided = []
    if mesh.size % (wider * mesh.shape["tensor"]) == 0:
        rest = "" if config.mesh.data == -1 else " --config.mesh.data=-1"
        divided = [f"mesh.fsdp={wider}{rest} (less of the state on each)"]
    if limit and held >= limit:  # no batch is small enough
        said = f"the state takes {held / gib:.2f} GiB a device before the first picture, and {limit / gib:.2f} are there"
        return _with_knobs(said, divided)
    said = "the step takes more memory than a device has"
    share = 0.5
    if needed and limit:
        said = f"the step takes {needed / gib:.2f} GiB a device and {limit / gib:.2f} are there"
        share = max((limit - held) / (needed - held), 1e-3)
    least = shares * parts
    smaller = int(batch * share) // least * least
    knobs = [f"train.batch_size={max(smaller, least)}"] if batch > least else []
    pieces = next((p for p in range(parts + 1, batch + 1) if batch % (p * shares) == 0 and p >= parts / share), None)
    knobs += [f"train.accumulate={pieces} (the same batch in smaller parts)"] if pieces else []
    network = getattr(getattr(config, "family", None), "network", None)
    if getattr(network, "remat", True) is not True:
        knobs.append("family.network.remat=True (recomputes activations)")
    return _with_knobs(said, knobs + divided)


def _with_knobs(said: str, knobs: list[str]) -> str:
    return f"{said}: " + (f"try --config.{', or --config.'.join(knobs)}" if knobs else "take more devices or a smaller network")
