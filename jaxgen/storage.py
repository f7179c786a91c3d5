"""The one seam for every path of a workdir or a data set, so that gs:// works as a local disk does.

Objects are written whole: nothing here appends to or renames a remote file, which object stores cannot do."""

import contextlib
import errno
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Generator
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
from etils import epath

from jaxgen.errors import NoSpace, UserError

Path = epath.Path
DRIVERS = {"gs://": ("gcsfs", "gcs")}  # what a remote path begins with: the package it needs, our extra that brings it
PART = ".part"  # how the name ends of a file that is being written


def as_path(path: "str | os.PathLike[str] | Path") -> Path:
    """A local path (with ~ expanded) or a remote one such as gs://bucket/run.

    Raises UserError where the package that reads the remote one is missing."""
    for prefix, (package, extra) in DRIVERS.items():
        if os.fspath(path).startswith(prefix) and importlib.util.find_spec(package) is None:
            raise UserError(f'{path}: {package} is not installed: `uv sync --extra {extra}` or `pip install "jaxgen[{extra}]"`')
    return epath.Path(path).expanduser()


def is_remote(path: Path) -> bool:
    return "://" in os.fspath(path)


@contextlib.contextmanager
def writing(path: Path) -> Generator[IO[bytes]]:
    """A file to be filled, which is there when the block ends: readers see the old content or the new, never a part. Makes
    missing parents.

    Raises UserError where the disk is full or writing is not permitted."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            buffer = io.BytesIO()
            yield buffer
            path.write_bytes(buffer.getvalue())
            return
        handle, temporary = tempfile.mkstemp(dir=os.fspath(path.parent), prefix=f".{path.name}.", suffix=PART)
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, os.fspath(path))
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise explain(error, path) from error


def sweep(directory: Path) -> None:
    """Takes away what `writing` had begun in a directory, if there is one, when its process was killed."""
    if not is_remote(directory) and directory.exists():
        for file in directory.iterdir():
            if file.name.startswith(".") and file.name.endswith(PART):
                file.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    with writing(path) as file:
        file.write(data)


def write_arrays(path: Path, *values: np.ndarray) -> None:
    """A .npy file, of several arrays one after the other, as np.load reads them from an open file; no copy in memory."""
    with writing(path) as file:
        # Into no more than something that can be written to: into a file it writes by itself, and does not say that it is full.
        sink = SimpleNamespace(write=file.write)
        for value in values:
            np.lib.format.write_array(sink, value, allow_pickle=False)  # ty: ignore[invalid-argument-type]


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_whole(source: Path, target: Path, last: str) -> None:
    """Copy the files of a directory; the one named `last` comes last: where it is, all are."""
    for file in sorted(source.iterdir(), key=lambda file: (file.name == last, file.name)):
        write_bytes(target / file.name, file.read_bytes())


def read_text(path: Path) -> str:
    """Raises UserError where the file is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or is no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no valid JSON ({error}); restore it from where it came") from None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, a quota or a limit is reached; libraries written in C++ say it in words alone."""
    words = ("No space left on device", "Disk quota exceeded", "File too large")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(w in str(error) for w in words)


def explain(error: BaseException, path: Any) -> UserError:
    """The one line for a write that the system refused."""
    if is_full(error):
        return NoSpace(f"no space left to write {path}: free some, or choose another directory")
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission to write {path}: choose a directory of your own")
    return UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or first_line(error)}")
