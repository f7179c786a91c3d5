"""The one seam for every path of a workdir or a data set, so that gs:// works as a local disk does.

Objects are written whole: nothing here appends to or renames a remote file, which object stores cannot do."""

import errno
import json
import os
import tempfile
from typing import Any

from etils import epath

from jaxgen.errors import UserError

Path = epath.Path


def as_path(path: "str | os.PathLike[str] | Path") -> Path:
    """A local path (with ~ expanded) or a remote one such as gs://bucket/run."""
    return epath.Path(path).expanduser()


def is_remote(path: Path) -> bool:
    return "://" in os.fspath(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file: readers see the old content or the new, never a part. Makes missing parents.

    Raises UserError where the disk is full or writing is not permitted."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_remote(path):
            path.write_bytes(data)
            return
        handle, temporary = tempfile.mkstemp(dir=os.fspath(path.parent), prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, os.fspath(path))
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise explain(error, path) from error


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError where the file is missing or is no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no valid JSON ({error}); restore it from where it came") from None


def explain(error: OSError, path: Any) -> UserError:
    """The one line for a write that the system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"no space left to write {path}: free some, or choose another directory")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission to write {path}: choose a directory of your own")
    return UserError(f"cannot write {path}: {error.strerror or error}")
