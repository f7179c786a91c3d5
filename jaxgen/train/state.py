"""What training changes, and where it lies on a mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxgen.families.base import Family, Shapes
from jaxgen.nn.module import Params
from jaxgen.parallel.mesh import param_shardings, replicated
from jaxgen.text.adapt import with_text

# Every use of randomness has its own stream: fold_in(fold_in(key(seed), step), purpose).
INIT, LOSS, SAMPLE, ADAPT = range(4)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Trainables only; what is frozen is an argument of the step.

    step: int32 [], steps done.
    params: {group: tree of float32}.
    ema_params: the same of the groups that draw.
    opt_state: {group: optax state}.
    control: {"failed": int32 [], the step whose loss or gradient was not finite, or -1}."""

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: Params
    control: dict[str, jax.Array]


def stream(seed: int | jax.Array, step: int | jax.Array, purpose: int) -> jax.Array:
    """The random key of a purpose at a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purpose)


def create(
    family: Family,
    shapes: Shapes,
    optimizers: dict[str, optax.GradientTransformation],
    seed: int,
    text: Callable[[jax.Array], Params] = lambda key: {},
) -> TrainState:
    """A fresh state; pure, to be jitted with `shardings` as its output's. `text` makes what is trained of the text encoder."""
    params = with_text(family.init(stream(seed, 0, INIT), shapes), text(stream(seed, 0, ADAPT)), family.drawn[0])
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, {group: params[group] for group in family.drawn}),
        opt_state={group: optimizers[group].init(tree) for group, tree in params.items()},
        control={"failed": jnp.full((), -1, jnp.int32)},
    )


def abstract_state(make: Callable[[Params], TrainState], base: Params, axes: Params, mesh: Mesh) -> TrainState:
    """What `make(base)` gives: jax.ShapeDtypeStructs, laid out on the mesh by the parameters' logical axes."""
    state = jax.eval_shape(make, base)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(place, state, shardings(state, axes, mesh))


def fresh(make: Callable[[Params], TrainState], base: Params, where: Any) -> TrainState:
    """`make(base)`, laid out as `where` (the state's tree of shardings) says."""
    # It runs once: on a CPU, compiling it well takes longer than it could ever save.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(make, out_shardings=where, compiler_options=options)(base)


def shardings(state: TrainState, axes: Params, mesh: Mesh) -> Any:
    """The state's tree with a NamedSharding in each array's place; `state` may be abstract.

    An optimizer's arrays that mirror a parameter (same trailing path, same shape) lie as that parameter lies."""
    params = param_shardings(mesh, axes, state.params)
    where = {_names(path): sharding for path, sharding in jax.tree_util.tree_leaves_with_path(params)}
    shape = {_names(path): p.shape for path, p in jax.tree_util.tree_leaves_with_path(state.params)}
    longest = max(map(len, where))

    def mirrored(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for length in range(min(longest, len(names)), 1, -1):
            # opt_state starts with the group's name, which the inner path of a mirrored tree lacks.
            candidate = (names[0], *names[len(names) - length + 1 :])
            if candidate in where and shape[candidate] == leaf.shape:
                return where[candidate]
        return replicated(mesh)

    return TrainState(
        step=replicated(mesh),  # ty: ignore[invalid-argument-type]
        params=params,
        ema_params={group: params[group] for group in state.ema_params},
        opt_state=jax.tree_util.tree_map_with_path(mirrored, state.opt_state),
        control=jax.tree.map(lambda _: replicated(mesh), state.control),
    )


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
