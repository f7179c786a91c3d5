"""Ways to adapt a pretrained language model to its generator: which arrays are trained, and what the model computes with them.

All are pure functions of plain parameter trees. `trained` is the tree of what training changes, float32, and nothing else;
it lies inside the parameters of the generator (`with_text`, `text_of`), so that optimizer, average, checkpoints and export
have it without knowing of it. LoRA and AdaLoRA take the parameters of any network with the layers of nn/."""

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.nn.module import Params, flatten, init_params, logical_axes, unflatten
from jaxgen.text.architecture import Architecture

if TYPE_CHECKING:
    from jaxgen.text.encoder import TextEncoder

TEXT = "text"  # the name of the trained arrays among a generator's parameters
PROJECTIONS = ("q", "k", "v", "context_k", "context_v", "out")  # arrays of nn.attention: [D, H, d], and out [H, d, D]


class Adaptation:
    """What each method offers; these are the defaults. `scheduled`: its numbers hang on how long a run is."""

    scheduled: ClassVar[bool] = False

    def init(self, key: jax.Array, params: Params, architecture: Any) -> Params:
        """`trained` for a model's `params`. Raises UserError for what the architecture does not have."""
        return {}

    def axes(self, architecture: Any) -> Params:
        """The tree of `init` with logical axis names in each array's place."""
        return {}

    def merge(self, params: Params, trained: Params) -> Params:
        """The parameters that the model computes with; pure and differentiable. `params` may lack what `trained` replaces."""
        return unflatten({**dict(flatten(params)), **dict(flatten(trained))})

    def penalty(self, trained: Params) -> jax.Array | None:
        """What is added to the generator's loss: float32 []."""
        return None

    def averaged(self, ema: Params, trained: Params) -> Params:
        """The running average of `trained` as it is kept."""
        return ema

    def optimizer(self, inner: Any, steps: int) -> Any:
        """The optax transformation for {TEXT: trained} over a run of `steps`, made of another one."""
        return inner


@register("frozen")
@dataclass(frozen=True)
class Frozen(Adaptation):
    """Nothing is trained."""

    def merge(self, params: Params, trained: Params) -> Params:
        return params


@register("full")
@dataclass(frozen=True)
class Full(Adaptation):
    """Every array is trained."""

    def init(self, key: jax.Array, params: Params, architecture: Architecture) -> Params:
        return _copied(params)

    def axes(self, architecture: Architecture) -> Params:
        return logical_axes(architecture.build)


@register("last_layers")
@dataclass(frozen=True)
class LastLayers(Adaptation):
    """The last `count` layers are trained (a norm after them is not)."""

    count: int = 1

    def validate(self) -> None:
        if self.count < 1:
            raise UserError(f"text.adapt.count={self.count} must be at least 1")

    def init(self, key: jax.Array, params: Params, architecture: Architecture) -> Params:
        return _copied(select(params, self._last(architecture)))

    def axes(self, architecture: Architecture) -> Params:
        return select(logical_axes(architecture.build), self._last(architecture))

    def _last(self, architecture: Architecture) -> Callable[[str], bool]:
        depth = architecture.depth
        if self.count > depth:
            raise UserError(f"text.adapt.count={self.count}: this text encoder has {depth} layers")
        return lambda name: name.startswith(tuple(f"layers.{i}." for i in range(depth - self.count, depth)))


class _Added(Adaptation):
    """New modules of nn/adapters.py in every layer; all else stays."""

    def extended(self, architecture: Any) -> Any:
        raise NotImplementedError

    def init(self, key: jax.Array, params: Params, architecture: Architecture) -> Params:
        new, build = self._new(architecture), self.extended(architecture).build
        return jax.jit(lambda key: select(init_params(build, key), new))(key)  # jitted: the rest is never made

    def axes(self, architecture: Architecture) -> Params:
        return select(logical_axes(self.extended(architecture).build), self._new(architecture))

    def _new(self, architecture: Architecture) -> Callable[[str], bool]:
        own = {name for name, _ in flatten(logical_axes(architecture.build))}
        return lambda name: name not in own


@register("bottleneck")
@dataclass(frozen=True)
class Bottleneck(_Added):
    """Houlsby's adapters of `size` units after attention and MLP of each layer (arXiv 1902.00751)."""

    size: int = 64

    def validate(self) -> None:
        if self.size < 1:
            raise UserError(f"text.adapt.size={self.size} must be at least 1")

    def extended(self, architecture: Any) -> Any:
        return replace(architecture, bottleneck=self.size)


@register("prefix")
@dataclass(frozen=True)
class Prefix(_Added):
    """`count` trained keys and values before those of each layer (Li and Liang, arXiv 2101.00190)."""

    count: int = 16

    def validate(self) -> None:
        if self.count < 1:
            raise UserError(f"text.adapt.count={self.count} must be at least 1")

    def extended(self, architecture: Any) -> Any:
        return replace(architecture, prefix=self.count)


@dataclass(frozen=True)
class _LowRank(Adaptation):
    """W + scale a b for the kernels of `targets`, or W + scale a diag(e) b; in `trained` the factors stand at W's name.

    a: [in, rank], b: [rank, out], e: [rank], where a kernel of more than two axes counts as the matrix it multiplies by."""

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")  # of q, k, v, out, up, down, gate, …; "all" is every linear layer

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, key: jax.Array, rows: int, columns: int) -> dict[str, jax.Array]:
        raise NotImplementedError

    def validate(self) -> None:
        if self.rank < 1:
            raise UserError(f"text.adapt.rank={self.rank} must be at least 1")
        if not self.targets:
            raise UserError('text.adapt.targets is empty: name the layers, as in ("q", "v"), or "all"')

    def init(self, key: jax.Array, params: Params, architecture: Architecture | None = None) -> Params:
        flat = dict(flatten(params))
        made = {}
        for name in targeted(flat, self.targets):
            split, shape = _inputs(name, flat[name]), flat[name].shape
            one = jax.random.fold_in(key, zlib.crc32(name.encode()))
            made[name] = self.factors(one, math.prod(shape[:split]), math.prod(shape[split:]))
        return unflatten(made)

    def axes(self, architecture: Architecture) -> Params:
        return self.axes_of(logical_axes(architecture.build))

    def axes_of(self, axes: Params) -> Params:
        """The tree of `init` with logical axis names, from a network's."""
        flat = dict(flatten(axes))
        made: dict[str, Any] = {}
        for name in targeted(flat, self.targets):
            made[name] = {"a": (flat[name][0], None), "b": (None, flat[name][_inputs(name, flat[name])])}
            if isinstance(self, AdaLoRA):
                made[name]["e"] = (None,)
        return unflatten(made)

    def merge(self, params: Params, trained: Params) -> Params:
        flat = dict(flatten(params))
        for name, f in factors_of(trained).items():
            kernel = flat[name]
            a = f["a"] * f["e"] if "e" in f else f["a"]
            change = self.scale * jnp.matmul(a, f["b"], precision="highest")
            flat[name] = (kernel + change.reshape(kernel.shape)).astype(kernel.dtype)
        return unflatten(flat)

    def replaced(self, params: Params, trained: Params) -> Params:
        """The kernels that `merge` changes: what `unmerge` asks for."""
        return select(params, factors_of(trained).__contains__)

    def unmerge(self, merged: Params, replaced: Params) -> Params:
        """The parameters before `merge`, bit for bit: the kernels are put back, since what adding has rounded off no
        subtraction restores."""
        return unflatten({**dict(flatten(merged)), **dict(flatten(replaced))})


@register("lora")
@dataclass(frozen=True)
class LoRA(_LowRank):
    """W + alpha / rank · a b (Hu et al., arXiv 2106.09685); with `rslora` alpha / sqrt(rank) (arXiv 2312.03732)."""

    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank) if self.rslora else super().scale

    def factors(self, key: jax.Array, rows: int, columns: int) -> dict[str, jax.Array]:
        a = jax.random.normal(key, (rows, self.rank)) / math.sqrt(rows)
        return {"a": a, "b": jnp.zeros((self.rank, columns))}


@register("adalora")
@dataclass(frozen=True)
class AdaLoRA(_LowRank):
    """W + alpha / rank · a diag(e) b, a and b held near orthogonal, whose least important directions are cut off while it
    trains, until `target_rank` a kernel are left on average (Zhang et al., arXiv 2303.10512)."""

    rank: int = 12  # at first
    target_rank: int = 8
    targets: tuple[str, ...] = ("q", "k", "v", "out", "up", "down")
    warmup_steps: int = 100  # with all directions
    final_steps: int = 100  # at the end, with those that are left
    every: int = 10  # steps from one cut to the next
    orthogonality: float = 0.1  # weight of |aᵀa - 1|² + |b bᵀ - 1|², a mean over the kernels
    beta1: float = 0.85  # of the running average of a weight's sensitivity |w dL/dw|
    beta2: float = 0.85  # and of that of its deviation
    scheduled: ClassVar[bool] = True

    def validate(self) -> None:
        super().validate()
        if not 1 <= self.target_rank <= self.rank:
            raise UserError(f"text.adapt.target_rank={self.target_rank} must lie between 1 and rank={self.rank}")
        if self.warmup_steps < 0 or self.final_steps < 0 or self.every < 1 or self.orthogonality < 0:
            raise UserError("text.adapt: warmup_steps, final_steps and orthogonality are at least 0, every at least 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UserError(f"text.adapt: beta1={self.beta1} and beta2={self.beta2} must lie in [0, 1)")

    def factors(self, key: jax.Array, rows: int, columns: int) -> dict[str, jax.Array]:
        first, second = jax.random.split(key)
        a, b = jax.random.normal(first, (rows, self.rank)), jax.random.normal(second, (self.rank, columns))
        return {"a": a / math.sqrt(rows), "b": b / math.sqrt(columns), "e": jnp.zeros(self.rank)}

    def penalty(self, trained: Params) -> jax.Array | None:
        if not trained:
            return None
        squares = [(f["a"].T @ f["a"], f["b"] @ f["b"].T) for f in factors_of(trained).values()]
        return self.orthogonality * jnp.sum((jnp.stack(jax.tree.leaves(squares)) - jnp.eye(self.rank)) ** 2) / len(squares)

    def averaged(self, ema: Params, trained: Params) -> Params:
        """A direction that has been cut off is so in the average too; that would otherwise forget it but slowly."""
        flat, now = dict(flatten(ema)), dict(flatten(trained))
        return unflatten({n: jnp.where(now[n] == 0, 0, leaf) if n.endswith(".e") else leaf for n, leaf in flat.items()})

    def budget(self, step: jax.Array, steps: int, kernels: int) -> jax.Array:
        """How many directions `kernels` kernels may have together after a step of `steps`: a cubic fall (eq. 11)."""
        share = jnp.clip((step - self.warmup_steps) / (steps - self.final_steps - self.warmup_steps), 0.0, 1.0)
        left = self.target_rank + (self.rank - self.target_rank) * (1.0 - share) ** 3
        return jnp.round(left * kernels).astype(jnp.int32)

    def optimizer(self, inner: Any, steps: int) -> Any:
        import optax

        if self.warmup_steps + self.final_steps >= steps:
            raise UserError(
                f"text.adapt: warmup_steps={self.warmup_steps} and final_steps={self.final_steps} leave none of "
                f"train.steps={steps} to cut ranks in"
            )

        def init(params: Any) -> dict[str, Any]:
            trained = {TEXT: params.get(TEXT, {})}
            zeros = jax.tree.map(jnp.zeros_like, trained)
            kept = {TEXT: select(jax.tree.map(jnp.ones_like, trained[TEXT]), lambda name: name.endswith(".e"))}
            return {"inner": inner.init(params), "step": jnp.int32(0), "mean": zeros, "deviation": zeros, "kept": kept}

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            grads, (updates, core) = updates, inner.update(updates, state["inner"], params)
            step = state["step"] + 1
            if not params.get(TEXT):
                return updates, {**state, "inner": core, "step": step}
            new = jax.tree.map(jnp.add, params[TEXT], updates[TEXT])
            sensitivity = jax.tree.map(lambda w, g: jnp.abs(w * g), new, grads[TEXT])
            average = lambda beta: lambda old, now: beta * old + (1.0 - beta) * now  # noqa: E731
            mean = jax.tree.map(average(self.beta1), state["mean"][TEXT], sensitivity)
            distance = jax.tree.map(lambda now, m: jnp.abs(now - m), sensitivity, mean)
            deviation = jax.tree.map(average(self.beta2), state["deviation"][TEXT], distance)
            chosen = self._chosen(jax.tree.map(jnp.multiply, mean, deviation), step, steps)
            end = steps - self.final_steps
            cut = (step > self.warmup_steps) & (step <= end) & ((step % self.every == 0) | (step == end))
            kept = jax.tree.map(lambda old, now: jnp.where(cut, now, old), state["kept"][TEXT], chosen)
            bound = cut | (step > end)  # between two cuts a direction may come back
            flat, values, masks = dict(flatten(updates[TEXT])), dict(flatten(params[TEXT])), dict(flatten(kept))
            for name, mask in masks.items():
                flat[name] = jnp.where(bound & (mask == 0), -values[name], flat[name])
            state = {"inner": core, "step": step, "mean": {TEXT: mean}, "deviation": {TEXT: deviation}, "kept": {TEXT: kept}}
            return {**updates, TEXT: unflatten(flat)}, state

        return optax.GradientTransformation(init, update)

    def _chosen(self, importance: Params, step: jax.Array, steps: int) -> Params:
        """1 for the directions that the budget keeps: a direction's importance is that of its e plus the mean of those of
        its column of a and its row of b (eq. 8)."""
        each = factors_of(importance)
        scores = jnp.stack([f["e"] + f["a"].mean(0) + f["b"].mean(1) for f in each.values()])
        order = jnp.argsort(jnp.argsort(-scores.ravel())).reshape(scores.shape)
        kept = (order < self.budget(step, steps, len(each))).astype(jnp.float32)
        return unflatten({f"{name}.e": kept[i] for i, name in enumerate(each)})


Method = Frozen | LastLayers | Full | LoRA | AdaLoRA | Bottleneck | Prefix


def adaptable(tree: Params) -> dict[str, str]:
    """{flat name of a kernel of a linear layer: what `targets` calls it}, of parameters or their logical axes."""
    found = {}
    for name, leaf in flatten(tree):
        *_, owner, last = ("", *name.split("."))
        if last == "kernel" and _ndim(leaf) == 2:
            found[name] = owner
        elif last in PROJECTIONS and _ndim(leaf) == 3:
            found[name] = last
    return found


def targeted(tree: Params, targets: tuple[str, ...]) -> list[str]:
    """The flat names of the kernels that `targets` means; raises UserError for an unknown one."""
    kernels = adaptable(tree)
    unknown = [target for target in targets if target not in {"all", *kernels.values()}]
    if unknown:
        known = ", ".join(dict.fromkeys(kernels.values()))
        raise UserError(f"text.adapt.targets: this text encoder has no layer {unknown[0]!r}; it has {known} (or all)")
    return [name for name, target in kernels.items() if target in targets or "all" in targets]


def factors_of(trained: Params) -> dict[str, dict[str, Any]]:
    """{flat name of a kernel: {"a", "b"} and with AdaLoRA "e"}."""
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in flatten(trained):
        kernel, _, factor = name.rpartition(".")
        found.setdefault(kernel, {})[factor] = leaf
    return found


def fitted(architecture: Any, params: Params) -> Any:
    """The architecture with those additions of nn/adapters.py that `params` has weights of."""
    sizes = {}
    for name, leaf in flatten(params):
        *_, owner, layer, last = ("", "", *name.split("."))
        if owner.startswith("adapter") and (layer, last) == ("down", "kernel"):
            sizes["bottleneck"] = leaf.shape[1]
        elif (layer, last) == ("prefix", "k"):
            sizes["prefix"] = leaf.shape[1]
    return replace(architecture, **sizes) if sizes else architecture


def adapted(encoder: "TextEncoder", method: Adaptation, trained: Params) -> "TextEncoder":
    """The encoder with what was trained for it; the one given stays as it is."""
    if not trained:
        return encoder
    new = copy.copy(encoder)
    new.params = method.merge(encoder.params, trained)
    return new


def keep_frozen(encoder: "TextEncoder", trained: Params) -> None:
    """Take from the encoder the arrays that `trained` replaces, so that they are not in memory twice."""
    own = {name for name, _ in flatten(trained)}
    encoder.params = select(encoder.params, lambda name: name not in own)
    if encoder.pretrained is not None:
        encoder.pretrained = replace(encoder.pretrained, params=encoder.params)


def with_text(params: Params, trained: Params, group: str) -> Params:
    """{group: tree} of a generator, one of its groups with `trained` in it."""
    if not trained:
        return params
    if TEXT in params[group]:
        raise ValueError(f"a network's part is called {TEXT!r}, which is the adapted text encoder's name")
    return {**params, group: {**params[group], TEXT: trained}}


def text_of(params: Params) -> Params:
    """What `with_text` put in; {} if nothing."""
    return next((tree[TEXT] for tree in params.values() if TEXT in tree), {})


def select(tree: Params, keep: Callable[[str], bool]) -> Params:
    """The part of a tree whose flat names are kept."""
    return unflatten({name: leaf for name, leaf in flatten(tree) if keep(name)})


def _copied(params: Params) -> Params:
    return jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)


def _ndim(leaf: Any) -> int:
    return len(leaf) if isinstance(leaf, tuple) else leaf.ndim


def _inputs(name: str, leaf: Any) -> int:
    """How many of a kernel's axes, the first ones, are inputs."""
    return 1 if name.split(".")[-1] in PROJECTIONS[:-1] else _ndim(leaf) - 1
