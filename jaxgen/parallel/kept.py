"""A run's compiled step on disk, so that the run that goes on neither traces nor compiles.

JAX's own cache is asked by what tracing has given, and tracing takes longer than all else a start does in Python. Here the
question is what the step is traced from: configuration, jaxgen's sources, versions, flags, devices. It is asked when the run
begins, and the program is read by a thread while data, text encoder and checkpoint are. What is found counts only where the
arrays that it is to take are laid out as those it was compiled for."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import platform
import threading
import zlib
from collections.abc import Generator
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxgen.errors import UserError
from jaxgen.storage import Path, as_path, write_bytes

HIT = "/jax/compilation_cache/cache_hits"
SWITCH = "JAXGEN_KEEP_PROGRAMS"  # train.py sets it to 1: in a notebook functions may have been replaced
THREADS = "kept-program"  # the name of those that read and write programs
PACKAGES = ("jax", "jaxlib", "numpy", "optax")
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC")


class KeptProgram:
    """The step that a run of this configuration, its family resolved, compiled first on this mesh. traced_from: the
    configuration's fields that a step hangs on."""

    def __init__(self, config: Any, mesh: Mesh, traced_from: dict[str, Any]):
        self._file = place(config, traced_from)
        self._key = digest(traced_from, mesh) if self._file is not None else ""
        self._devices, self._found = list(mesh.devices.flat), None
        self._reader = threading.Thread(target=self._read, name=THREADS)
        self._reader.start()

    def get(self, arguments: Any, *marks: str) -> Any:
        """The program for arguments like these, or None. marks: what else it is traced from, as the text encoder's
        fingerprint."""
        self._reader.join()
        found, self._found = self._found, None
        return found[1] if found is not None and found[0] == layout(arguments, marks) else None

    def keep(self, program: Any, arguments: Any, *marks: str) -> None:
        """Beside the run's first steps."""
        if self._file is not None:
            written = self._file, program, layout(arguments, marks)
            threading.Thread(target=self._write, args=written, name=THREADS).start()

    def _read(self) -> None:
        if self._file is None or not self._file.exists():
            return
        try:
            key, where, program = pickle.loads(zlib.decompress(self._file.read_bytes()))
            if key == self._key:
                self._found = where, serialize_executable.deserialize_and_load(*program, execution_devices=self._devices)
        except Exception:  # damaged, or of another build of XLA: there is no end to what is raised then, and it is made anew
            self._found = None

    def _write(self, file: Path, program: Any, where: str) -> None:
        try:
            whole = pickle.dumps((self._key, where, serialize_executable.serialize(program)))
            write_bytes(file, zlib.compress(whole, 1))
        except (UserError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):  # no room, or no such program
            return


@contextlib.contextmanager
def hits() -> Generator[list[str]]:
    """Fills the list, within, with a word for each program that this thread has from JAX's cache."""
    here, found = threading.get_ident(), []
    listener = lambda event, **_: found.append(event) if event == HIT and threading.get_ident() == here else None  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_listener(listener)


def place(config: Any, traced_from: dict[str, Any]) -> Path | None:
    """The file of the program, beside JAX's own; None where none is to be kept. Several processes would have to find it all
    or none, and of a configuration with classes that are not jaxgen's the sources are not known."""
    cache = jax.config.values["jax_compilation_cache_dir"]
    kept = os.environ.get(SWITCH, "0") != "0" and jax.process_count() == 1 and ours(config)
    if not kept or not cache or "://" in cache:
        return None
    return as_path(cache) / f"step-{hashlib.sha256(said(traced_from)).hexdigest()[:32]}"


def said(traced_from: dict[str, Any]) -> bytes:
    return json.dumps(traced_from, sort_keys=True, default=str).encode()


def layout(arguments: Any, marks: tuple[str, ...]) -> str:
    """A digest of the arrays' names, shapes, dtypes and places."""
    leaves = jax.tree_util.tree_leaves_with_path(arguments)
    each = [f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype} {x.sharding}" for path, x in leaves]
    return hashlib.sha256("\n".join([*each, *marks]).encode()).hexdigest()


def digest(traced_from: dict[str, Any], mesh: Mesh) -> str:
    """Of all that a step is traced and compiled from, but for the arrays it takes."""
    processor = pathlib.Path("/proc/cpuinfo")
    parts = [
        sorted((name, str(value)) for name, value in jax.config.values.items()),
        [importlib.metadata.version(name) for name in PACKAGES],
        [os.environ.get(name, "") for name in FLAGS],
        [platform.python_version(), platform.machine(), jax.devices()[0].client.platform_version],
        [str(mesh.shape), [(d.id, d.device_kind) for d in mesh.devices.flat]],
        # A CPU's programs are made for what that one can do.
        next((line for line in processor.read_text().splitlines() if line.startswith("flags")), "")
        if processor.exists()
        else "",
    ]
    whole = hashlib.sha256(said(traced_from) + json.dumps(parts).encode())
    for file in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        whole.update(file.read_bytes())
    return whole.hexdigest()


def ours(value: Any) -> bool:
    """Whether all parts of a configuration are of jaxgen's own classes."""
    if isinstance(value, tuple | list):
        return all(map(ours, value))
    if not dataclasses.is_dataclass(value):
        return True
    own = type(value).__module__.split(".")[0] == "jaxgen"
    return own and all(ours(getattr(value, field.name)) for field in dataclasses.fields(value))
