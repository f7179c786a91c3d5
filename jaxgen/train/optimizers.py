"""Learning-rate schedules and optimizers, all of them optax's."""

from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxgen.nn.module import Params
from jaxgen.text.adapt import TEXT
from jaxgen.text.config import TextConfig
from jaxgen.train.config import OptimizerConfig
from jaxgen.train.muon import orthogonalized


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then the named schedule down to zero at `steps` (a constant one stays)."""
    peak, rest = config.learning_rate, max(steps - config.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "trapezoid": lambda: optax.linear_schedule(
            peak, 0.0, max(int(rest * config.decay_share), 1), transition_begin=rest - int(rest * config.decay_share)
        ),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return after
    # Starts above zero: a first step that changes nothing wastes a batch.
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def same_until(config: OptimizerConfig, steps: int, others: int, step: int) -> bool:
    """Whether runs of so many steps and of `others` have had the same learning rate when `step` of them are done."""
    first = np.arange(step)
    return np.array_equal(learning_rate(config, steps)(first), learning_rate(config, others)(first))


def make_optimizer(
    config: OptimizerConfig, steps: int, mesh: Mesh | None = None, text: TextConfig | None = None
) -> optax.GradientTransformation:
    """One group's optimizer; make one per group. Where there is a mesh, its devices share the work that can be shared.

    What `text` trains of the text encoder takes AdamW at a rate of its own."""
    rate = learning_rate(config, steps)
    decays = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731

    def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays)

    parts: dict[Any, optax.GradientTransformation] = {"adamw": adamw(rate)}
    if config.name == "muon":
        parts["muon"] = optax.chain(
            optax.trace(config.momentum, nesterov=True),
            orthogonalized(mesh),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
    if text is not None and text.adapted:
        parts[TEXT] = text.adapt.optimizer(adamw(lambda step: text.adapt_learning_rate_scale * rate(step)), steps)
    core = parts["adamw"] if len(parts) == 1 else optax.partition(parts, lambda params: _labels(params, parts))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core) if config.clip_norm > 0 else core


def _labels(params: Params, parts: Collection[str]) -> Params:
    """Muon is for the kernels between; vectors, the first and the last layer take AdamW, and so does the text encoder."""

    def label(path: Any, p: jax.Array) -> str:
        names = [key.key for key in path]
        if TEXT in parts and names[0] == TEXT:
            return TEXT
        return "adamw" if p.ndim < 2 or {"stem", "head"} & set(names) or "muon" not in parts else "muon"

    return jax.tree_util.tree_map_with_path(label, params)
