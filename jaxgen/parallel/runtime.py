"""Starting JAX for a run: processes, virtual CPU devices, compile cache, precision, and a check that nothing is unseen."""

import contextlib
import ctypes
import gc
import os
import re
import shutil
import sys
import time
import traceback
import urllib.request
import zlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.errors import UserError
from jaxgen.storage import as_path, sweep

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"  # of a Google Cloud machine


def start(allow_cpu: bool = False) -> None:
    """Call once, before the first device is asked for.

    Joins the other processes when the environment names them, gives a CPU one device a core (a measured win: XLA uses
    the cores better so), keeps freed memory and, on disk, compiled programs, and raises UserError where the host has an
    accelerator that JAX does not see."""
    keep_memory()
    cpu_only = os.environ.get("JAX_PLATFORMS", "") == "cpu"
    devices = int(os.environ.get("JAXGEN_CPU_DEVICES", 0)) or cores()
    distributed = multi_host(os.environ)
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not forced:
        jax.config.update("jax_num_cpu_devices", devices)
    if forced or devices > 1 or distributed is not None:
        # XLA's pool has a thread a core; devices that meet in a collective each hold one while others still compute, and
        # with none to spare they wait for ever. A device that is alone has none to meet.
        os.environ.setdefault("NPROC", str(2 * cores()))
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/jaxgen/xla").expanduser()))
    if cache and "://" not in cache:  # empty: switched off
        sweep_programs(Path(cache))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # A host that is frozen or cut off is given up after so long; one that dies is noticed at once.
        jax.distributed.initialize(**distributed, heartbeat_timeout_seconds=30)
    if jax.default_backend() == "cpu" and not allow_cpu and not cpu_only:
        unseen = unseen_accelerator(os.environ)
        if unseen is not None:
            raise UserError(unseen)


def sweep_programs(cache: Path) -> None:
    """Takes away compiled programs of which a killed process or a full disk left a part. JAX writes them in place and never
    again: at every start it would read such a one in vain, and compile."""
    stamp, now = cache / ".swept", time.time()  # what is older than the stamp has been found whole
    with contextlib.suppress(OSError):
        sweep(as_path(cache))
        since = stamp.stat().st_mtime if stamp.exists() else 0.0
        for file in cache.glob("*-cache"):
            if file.stat().st_mtime >= since and not is_whole(file.read_bytes()):
                file.unlink()
        if cache.is_dir():
            stamp.touch()
            os.utime(stamp, (now, now))


def is_whole(compressed: bytes) -> bool:
    """Whether bytes that zlib has compressed are all there. What another library has compressed is taken for whole."""
    if not compressed.startswith(b"\x78"):
        return bool(compressed)
    reader = zlib.decompressobj()
    try:
        reader.decompress(compressed)
    except zlib.error:
        return False
    return reader.eof


def keep_memory() -> None:
    """Has glibc keep what is freed. A program's temporary memory is taken and freed whole at each call: given back to the
    kernel, every page of it would be cleared again for the next call, a quarter of a training step on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h's names; threads begin after this, and share the one heap
    for name, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
        mallopt(name, value)


def trim_memory() -> None:
    """Gives back to the system what `keep_memory` holds of what has been freed so far: before a loop that needs less."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def steady_memory() -> Generator[None]:
    """Around a loop: what came before has been given back, and its own garbage is collected while it is little.

    Python looks for circles only once a quarter of all it knows is new: after imports and compilation that is late, and
    takes long. So what is alive at the beginning is set aside until the end."""
    gc.collect()
    trim_memory()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def together() -> Generator[None]:
    """Around what several processes do in step: one of them that fails ends at once, and the others with it.

    Without, it would wait at its exit for the others, and they for it in their next collective. Exit status: 2 after a
    UserError, 3 where another process was lost, else 1. With one process it does nothing."""
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, UserError):
            status = 2
            print(f"error: {error}", file=sys.stderr)
        elif lost_peer(error):
            status = 3
            print(
                f"error: another process of this run has ended or cannot be reached ({str(error).splitlines()[0][:160]}): "
                "start all of them again, and they go on from the last checkpoint",
                file=sys.stderr,
            )
        else:
            status = 1
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def synchronise(what: str) -> None:
    """Waits until all processes have come to the same place; with one process it does nothing."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def lost_peer(error: BaseException) -> bool:
    """Whether an error of XLA's is another process's end, as seen from here."""
    signs = (
        "Gloo",
        "NCCL",
        "UNAVAILABLE",
        "DEADLINE_EXCEEDED",
        "ABORTED",
        "heartbeat",
        "Connection reset",
        "coordination service",
    )
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in str(error) for sign in signs)


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multi_host(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of jax.distributed.initialize where the environment says that this is one process of several."""
    if "JAX_COORDINATOR_ADDRESS" in environment:
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        missing = [name for name in names if name not in environment]
        if missing:
            raise UserError(f"JAX_COORDINATOR_ADDRESS is set and {', '.join(missing)} is not: set all of {', '.join(names)}")
        return {
            "coordinator_address": environment[names[0]],
            "num_processes": int(environment[names[1]]),
            "process_id": int(environment[names[2]]),
        }
    tpu_hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    slurm_tasks = int(environment.get("SLURM_NTASKS", 1))
    several = len(tpu_hosts) > 1 or slurm_tasks > 1 or ("TPU_SKIP_MDS_QUERY" not in environment and tpu_workers() > 1)
    return {} if several else None  # jax finds the rest by itself


def on_google_cloud(root: Path = Path("/")) -> bool:
    """Whether this is one of its virtual machines, a TPU VM included."""
    try:
        return "Google" in (root / "sys/class/dmi/id/product_name").read_text()
    except OSError:
        return False


def tpu_workers(metadata: str | None = None) -> int:
    """Hosts of the TPU slices that this one is of, as Google Cloud's metadata (an address) tell; 1 where there are none."""
    if metadata is None and not on_google_cloud():
        return 1

    def attribute(name: str) -> str:
        request = urllib.request.Request(f"{metadata or METADATA}attributes/{name}", headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    slices = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", attribute("tpu-env"))
    return len(attribute("worker-network-endpoints").split(",")) * (int(slices[1]) if slices else 1)


def unseen_accelerator(environment: Mapping[str, str], root: Path = Path("/")) -> str | None:
    """What is wrong, and the command that mends it, where the host has an accelerator and JAX runs on the CPU."""
    nvidia = (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidia0").exists()
    if nvidia and environment.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        kind, extra = "an NVIDIA GPU", "cuda"
    elif list((root / "dev").glob("accel[0-9]*")) or "TPU_NAME" in environment:
        kind, extra = "a TPU", "tpu"
    else:
        return None
    return (
        f"this host has {kind} and JAX sees only the CPU: "
        f'run `uv sync --extra {extra}` (or `pip install "jaxgen[{extra}]"`), or add --allow_cpu to go on without it'
    )


def compute_dtype(name: str) -> Any:
    """ "auto" is bfloat16 where the device computes in it natively (TPUs, GPUs from Ampere on), else float32."""
    if name == "auto":
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", None)
        native = device.platform == "tpu" or (capability is not None and float(capability) >= 8.0)
        return jnp.bfloat16 if native else jnp.float32
    if name not in ("float32", "bfloat16"):
        raise UserError(f"train.compute_dtype={name}: one of auto, float32, bfloat16")
    return jnp.dtype(name)


def describe(dtype: Any) -> str:
    """The first line of a run: where it runs and in what precision."""
    device = jax.devices()[0]
    return (
        f"jax {jax.__version__} on {device.platform} ({device.device_kind}) × {jax.device_count()} devices, "
        f"{jax.process_count()} process{'es' if jax.process_count() > 1 else ''}, computing in {jnp.dtype(dtype).name}"
    )


def require(modules: tuple[str, ...], extra: str) -> None:
    """Raises UserError naming the extra to install where one of `modules` is missing."""
    import importlib.util

    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        command = shutil.which("uv") and Path("pyproject.toml").exists()
        mend = f"uv sync --extra {extra}" if command else f'{Path(sys.executable).name} -m pip install "jaxgen[{extra}]"'
        raise UserError(f"{', '.join(missing)} is not installed: run `{mend}`")
