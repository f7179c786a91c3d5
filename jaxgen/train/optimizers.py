"""Learning-rate schedules and optimizers, all of them optax's."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxgen.errors import UserError
from jaxgen.nn.module import Params


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear", "trapezoid"] = "cosine"
    warmup_steps: int = 100
    decay_share: float = 0.3  # of a trapezoid's steps, at the end, in which the rate falls to zero
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.95  # Muon's
    weight_decay: float = 0.01  # of matrices and kernels only
    clip_norm: float = 1.0  # of all gradients of a group together; 0 is off

    def validate(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate} must be positive")
        if not 0.0 < self.decay_share <= 1.0:
            raise UserError(f"optimizer.decay_share={self.decay_share} must lie in (0, 1]")


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
        core = optax.adamw(
            rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays
        )
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
            muon_weight_dimension_numbers=_muon_dimensions,
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
