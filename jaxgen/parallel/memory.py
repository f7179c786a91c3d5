"""Whether a compiled step fits into its devices, and what to change where it does not."""

import re
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxgen.errors import UserError


def compile_checked(lowered: Any, config: Any, mesh: Mesh, limit: float | None = None) -> Any:
    """The compiled step. Raises UserError with what to change where it takes more memory than a device has.

    config: has the sections train and mesh. limit: bytes a device; by default what this machine's devices have."""
    try:
        compiled = lowered.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)([MGT]) of ([\d.]+)([MGT]) hbm", str(error))
        sizes = {"M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
        needed, there = (float(used.group(i)) * sizes[used.group(i + 1)] for i in (1, 3)) if used else (None, limit)
        raise UserError(too_large(config, mesh, needed, there, None)) from None
    there = limit if limit is not None else free_memory(compiled, mesh)
    if there is not None and memory(compiled) > there:
        state = compiled.memory_analysis().argument_size_in_bytes
        raise UserError(too_large(config, mesh, memory(compiled), there, state))
    return compiled


def memory(compiled: Any) -> float:
    """Bytes a device at the step's peak, its state and batch included."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def free_memory(compiled: Any, mesh: Mesh) -> float | None:
    """Bytes a device that a step may take, what already lies there of it included; None where that is not known."""
    devices = mesh.local_devices
    stats = devices[0].memory_stats() if hasattr(devices[0], "memory_stats") else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    file = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", file.read_text()) if file.exists() else None
    if devices[0].platform != "cpu" or found is None:
        return None
    return int(found.group(1)) * 1024 / len(devices) + compiled.memory_analysis().argument_size_in_bytes


def too_large(config: Any, mesh: Mesh, needed: float | None, limit: float | None, state: float | None) -> str:
    """The line that says so, with values to try, those first that change nothing else."""
    gib, batch, parts = 2**30, config.train.batch_size, config.train.accumulate
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    said = "the step takes more memory than a device has"
    share = 0.5
    if needed and limit:
        said = f"the step takes {needed / gib:.2f} GiB a device and {limit / gib:.2f} are there"
        fixed = state if state is not None and state < limit else 0.0
        share = max((limit - fixed) / (needed - fixed), 1e-3)
    least = shares * parts
    smaller = int(batch * share) // least * least
    knobs = [f"train.batch_size={max(smaller, least)}"] if batch > least else []
    pieces = next((p for p in range(parts + 1, batch + 1) if batch % (p * shares) == 0 and p >= parts / share), None)
    knobs += [f"train.accumulate={pieces} (the same batch in smaller parts)"] if pieces else []
    network = getattr(getattr(config, "family", None), "network", None)
    if getattr(network, "remat", True) is not True:
        knobs.append("family.network.remat=True (recomputes activations)")
    wider = mesh.shape["fsdp"] * 2
    if mesh.size % (wider * mesh.shape["tensor"]) == 0:
        rest = "" if config.mesh.data == -1 else " --config.mesh.data=-1"
        knobs.append(f"mesh.fsdp={wider}{rest} (less of the state on each)")
    return f"{said}: " + (f"try --config.{', or --config.'.join(knobs)}" if knobs else "take more devices or a smaller network")
