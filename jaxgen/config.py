"""Reads a configuration file, applies overrides, checks. It knows no section: each is a frozen dataclass of its room.

A file defines get_config(), which returns a tree of frozen dataclasses. An override names a field by its dotted path
and is read by the field's annotation. A section with a validate() method is checked after all overrides."""

import dataclasses
import difflib
import importlib.util
import json
import runpy
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxgen.errors import UserError

_TYPES: dict[str, type] = {}


def register(name: str):
    """Class decorator: the dataclass is written as {"type": name, ...} and may be chosen by that name."""

    def decorate(cls: type) -> type:
        _TYPES[name] = cls
        setattr(cls, "_config_type", name)  # noqa: B010
        return cls

    return decorate


def load(path: str, overrides: Iterable[str] = ()) -> Any:
    """The finalized configuration of a file, or of the packaged file of the same name; overrides are "A.B=VALUE".

    Raises UserError for a missing or broken file, an unknown field, a wrong type or a value a section refuses."""
    file = Path(path)
    if not file.is_file():
        packaged = importlib.util.find_spec("jaxgen_configs")
        places = list(packaged.submodule_search_locations or []) if packaged else []
        places.append(str(Path(__file__).parent.parent / "configs"))
        found = [p for p in (Path(place) / file.name for place in places) if p.is_file()]
        if not found:
            known = sorted({p.name for place in places for p in Path(place).glob("*.py")})
            raise UserError(f"--config={path}: no such file; the shipped ones are {', '.join(known) or 'missing'}")
        file = found[0]
    try:
        namespace = runpy.run_path(str(file))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={path} does not run: {type(error).__name__}: {error}") from error
    if not callable(namespace.get("get_config")):
        raise UserError(f"--config={path} defines no get_config(); see configs/quickstart.py for one that does")
    return finalize(apply_overrides(namespace["get_config"](), overrides))


def finalize(config: Any) -> Any:
    """Run validate() of every section, depth first, and return the configuration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            finalize(value)
    if hasattr(config, "validate"):
        config.validate()
    return config


def apply_overrides(config: Any, overrides: Iterable[str]) -> Any:
    """A new configuration with "A.B=VALUE" assignments made in order."""
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--config.{name}: give a value, as in --config.{name}=VALUE")
        config = _replace(config, name.split("."), text, name)
    return config


def _replace(config: Any, path: list[str], text: str, full: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    if path[0] not in names:
        prefix = full[: len(full) - len(".".join(path))]
        raise UserError(f"--config.{full}: unknown field {path[0]!r};{_nearest(path[0], names, prefix)}")
    value = getattr(config, path[0])
    if len(path) == 1:
        new = _parse(text, typing.get_type_hints(type(config))[path[0]], full)
    elif dataclasses.is_dataclass(value):
        new = _replace(value, path[1:], text, full)
    else:
        raise UserError(f"--config.{full}: {path[0]!r} is a value and has no field {path[1]!r}")
    return dataclasses.replace(config, **{path[0]: new})


def _nearest(name: str, names: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" did you mean {prefix}{close[0]}?" if close else f" known here: {', '.join(names)}"


def _parse(text: str, hint: Any, name: str) -> Any:
    """A value of type `hint` from its text on a command line."""
    for option in _options(hint):
        try:
            return _parse_one(text, option)
        except ValueError:
            continue
    wanted = " or ".join(_describe(option) for option in _options(hint))
    raise UserError(f"--config.{name}={text}: not {wanted}")


def _parse_one(text: str, hint: Any) -> Any:
    if hint is type(None):
        if text.lower() in ("none", "null"):
            return None
    elif hint is bool:
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
    elif hint in (int, float, str):
        return hint(text)
    elif typing.get_origin(hint) is typing.Literal:
        for choice in typing.get_args(hint):
            if text == str(choice):
                return choice
    elif typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
        if len(kinds) == 2 and kinds[1] is ...:
            return tuple(_parse_one(part, kinds[0]) for part in parts)
        if len(parts) == len(kinds):
            return tuple(_parse_one(part, kind) for part, kind in zip(parts, kinds, strict=True))
    elif dataclasses.is_dataclass(hint) and getattr(hint, "_config_type", None) == text:
        return hint()
    raise ValueError(text)


def _options(hint: Any) -> list[Any]:
    """The members of a union, None first so that "none" is not taken for a string."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = sorted(typing.get_args(hint), key=lambda option: option is not type(None))
        return [option for member in members for option in _options(member)]
    if isinstance(hint, type) and not dataclasses.is_dataclass(hint):
        # A base class stands for every registered section made from it.
        return [cls for cls in _TYPES.values() if hint in cls.__mro__] or [hint]
    return [hint]


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a comma-separated list"
    if dataclasses.is_dataclass(hint):
        return getattr(hint, "_config_type", hint.__name__)
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return simple.get(hint, "none" if hint is type(None) else str(hint))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries and lists fit for JSON."""
    out: dict[str, Any] = {"type": config._config_type} if hasattr(config, "_config_type") else {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(out))


def from_dict(cls: Any, values: dict[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict`; raises UserError for unknown fields and types. Missing fields take their defaults."""
    values = dict(values)
    kind = values.pop("type", None)
    if kind is not None:
        if kind not in _TYPES:
            raise UserError(f"{where}: unknown type {kind!r}; known: {', '.join(sorted(_TYPES))}")
        return from_dict(_TYPES[kind], values, where)
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in names:
            raise UserError(f"{where}.{name}: unknown field;{_nearest(name, names, '')}")
    return cls(**{name: _revive(value, hints[name], f"{where}.{name}") for name, value in values.items()})


def _revive(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, dict):
        sections = [option for option in _options(hint) if dataclasses.is_dataclass(option)]
        if not sections:
            raise UserError(f"{where} is a section where a value belongs")
        return from_dict(sections[0], value, where)
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in _options(hint) and int not in _options(hint):
        return float(value)
    return value


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, value in a, value in b) of every field in which two `to_dict` results differ."""
    for name in sorted(a.keys() | b.keys()):
        left, right = a.get(name), b.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            yield from differences(left, right, f"{prefix}{name}.")
        elif left != right:
            yield f"{prefix}{name}", left, right


def split_arguments(argv: Iterable[str]) -> tuple[str | None, list[str], list[str]]:
    """(the value of --config, the overrides of --config.A.B, the other arguments); "=" and a space both work."""
    path, overrides, rest = None, [], []
    words = iter(argv)
    for word in words:
        if word == "--config" or (word.startswith("--config.") and "=" not in word):
            word = f"{word}={next(words, '')}"
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word.startswith("--config."):
            overrides.append(word.removeprefix("--config."))
        else:
            rest.append(word)
    return path, overrides, rest
