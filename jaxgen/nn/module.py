"""nnx modules as pure functions of plain parameter trees.

nnx describes layers and nothing else: outside a call parameters are nested dictionaries of arrays, whose flattened
names join by "." (the names in an exported file and in a checkpoint).
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

Params = dict[str, Any]
Build = Callable[[nnx.Rngs], nnx.Module]


class Keys:
    """What nnx.Rngs(params=key) is to `param`, the same keys: that one keeps its count in a variable, which takes longer under
    a trace than all the rest of making a module. Without a key parameters have shapes alone."""

    def __init__(self, key: jax.Array | None = None):
        self.key, self.count = key, -1

    def params(self) -> jax.Array | None:
        self.count += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.count)


def param(init: Callable[..., jax.Array], rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A float32 parameter whose dimensions carry logical axis names (parallel/mesh.py says what they map to)."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} axis names, got {axes}")
    key: Any = rngs.params()
    return nnx.Param(jax.ShapeDtypeStruct(shape, np.float32) if key is None else init(key, shape), axes=axes)


def init_params(build: Build, key: jax.Array) -> Params:
    """Fresh parameters of the module that `build` makes; pure, so it can be jitted with output shardings."""
    keys: Any = Keys(key)
    state = nnx.state(build(keys), nnx.Param)
    return nested((path, variable[...]) for path, variable in _flat(state))


def logical_axes(build: Build) -> Params:
    """The tree of `init_params` with a tuple of logical axis names in each array's place."""
    _, state = _abstract(build)
    return nested((path, variable.get_metadata("axes")) for path, variable in _flat(state))


def bind(build: Build, params: Params) -> Any:
    """The module that `build` makes, holding `params`. Meant for use inside a traced function: nothing is computed.

    Raises KeyError where `params` lacks one of the module's parameters."""
    graphdef, state = _abstract(build)
    values = [(path, variable.replace(lookup(params, map(str, path)))) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


def nested(flat: Any) -> Params:
    """A nested dictionary from (path, leaf) pairs, a path being a sequence of names."""
    tree: Params = {}
    for path, leaf in flat:
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def flatten(tree: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) pairs of a nested dictionary, in sorted order."""
    for name in sorted(tree):
        value = tree[name]
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return nested((name.split("."), leaf) for name, leaf in flat.items())


def fingerprint(tree: Params) -> str:
    """SHA-256 (hexadecimal) of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, leaf in flatten(jax.device_get(tree)):
        value = np.ascontiguousarray(leaf)
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def dtype_of(params: Params) -> Any:
    """The dtype of a tree whose arrays share it: what a network computes in."""
    return jax.tree.leaves(params)[0].dtype


def lookup(tree: Params, path: Any) -> Any:
    """The leaf or subtree of a nested dictionary at a path of names."""
    for name in path:
        tree = tree[name]
    return tree


def _flat(state: nnx.State) -> Iterator[tuple[tuple[str, ...], Any]]:
    return ((tuple(map(str, path)), variable) for path, variable in nnx.to_flat_state(state))


def _abstract(build: Build) -> tuple[Any, Any]:
    shapes: Any = Keys()
    return nnx.split(build(shapes), nnx.Param)
