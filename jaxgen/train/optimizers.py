"""Learning-rate schedules and optimizers, all of them optax's."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxgen.nn.module import Params
from jaxgen.train.config import OptimizerConfig


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """One group's optimizer; make one per group."""
    rate = learning_rate(config, steps)
    decays = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)  # noqa: E731
    if config.name == "adamw":
        core = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays)
    else:
        # consistent_rms gives Muon's updates AdamW's size, so that one learning rate serves both (arXiv 2502.16982).
        core = optax.contrib.muon(
            rate,
            beta=config.momentum,
            adam_b1=config.b1,
            adam_b2=config.b2,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimensions,  # ty: ignore[invalid-argument-type]
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), core) if config.clip_norm > 0 else core


def _muon_dimensions(params: Params) -> Params:
    """Which dimensions of each kernel are rows and columns; None (vectors, first and last layers) means Adam."""

    def dimensions(path: Any, p: jax.Array) -> MuonDimensionNumbers | None:
        names = [key.key for key in path]
        if p.ndim < 2 or "stem" in names or "head" in names:
            return None
        if names[-1] in ("q", "k", "v", "context_k", "context_v"):  # [D, H, d]
            return MuonDimensionNumbers((0,), (1, 2))
        return MuonDimensionNumbers(tuple(range(p.ndim - 1)), (p.ndim - 1,))

    return jax.tree_util.tree_map_with_path(dimensions, params)
