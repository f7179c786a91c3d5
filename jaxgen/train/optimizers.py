"""Learning-rate schedules and optimizers, all of them optax's."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxgen.nn.module import Params
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


def make_optimizer(config: OptimizerConfig, steps: int, mesh: Mesh | None = None) -> optax.GradientTransformation:
    """One group's optimizer; make one per group. Where there is a mesh, its devices share the work that can be shared."""
    rate = learning_rate(config, steps)
    decays = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    core = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays)
    if config.name == "muon":
        orthogonal = optax.chain(
            optax.trace(config.momentum, nesterov=True),
            orthogonalized(mesh),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        core = optax.partition({"muon": orthogonal, "adamw": core}, _labels)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core) if config.clip_norm > 0 else core


def _labels(params: Params) -> Params:
    """Muon is for the kernels between; vectors, the first and the last layer take AdamW."""

    def label(path: Any, p: jax.Array) -> str:
        ends = {"stem", "head"} & {key.key for key in path}
        return "adamw" if p.ndim < 2 or ends else "muon"

    return jax.tree_util.tree_map_with_path(label, params)
