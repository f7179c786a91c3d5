"""A whole run, as a configuration file's get_config() returns it: one section a room."""

from dataclasses import dataclass, field
from typing import Literal

from jaxgen import families
from jaxgen.data.config import DataConfig
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.text.config import TextConfig
from jaxgen.text.encoder import TextEncoder


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 10_000
    batch_size: int = 64  # over all devices and processes
    accumulate: int = 1  # micro-batches a step: less memory, the same result
    ema_decay: float = 0.999
    compute_dtype: str = "auto"  # bfloat16 where the device has it natively, else float32
    log_every: int = 50
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3  # the best one is kept besides
    # Another run's workdir (or an exported model) to take the weights from; of several, with commas between them, each weight
    # from the first that has it.
    init_from: str | None = None
    init_skip: tuple[str, ...] = ()  # names or prefixes of weights to leave fresh

    def validate(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulate:
            raise UserError(f"train.batch_size={self.batch_size} is no multiple of train.accumulate={self.accumulate}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise UserError(f"train.ema_decay={self.ema_decay} must lie in [0, 1)")


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


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn by default, and which ones while training."""

    prompts: tuple[str, ...] = ()
    every: int = 1000
    num_images: int = 1  # a prompt, on the sheets drawn while training
    num_steps: int = 20
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sampler: str = ""  # the family's first one
    temperature: float = 1.0  # of what is drawn at random: latents, tokens
    top_k: int = 0  # tokens to choose among; 0 is all
    top_p: float = 1.0  # share of the probability to choose among
    aspect_ratio: float = 1.0  # width over height: the nearest shape of as many pixels as the square has (data/buckets.py)


@dataclass(frozen=True)
class EvalConfig:
    """Metrics on `validation` while training: eval/loss for every set, eval/exact and its parts for scenes, eval/diversity
    where `diversity` asks for it: how far apart four pictures of one prompt lie.

    The checkpoint with the best `metric` is kept; `patience` evaluations without a new best end the run (0: never)."""

    every: int = 0  # steps; 0 is never
    count: int = 256  # examples
    diversity: int = 0  # prompts; 0 is never
    metric: str = "eval/loss"
    patience: int = 0

    def validate(self) -> None:
        if self.diversity < 0:
            raise UserError(f"eval.diversity={self.diversity} is a number of prompts: 0 for none")

    def score(self, metrics: dict[str, float]) -> float:
        """The metric so that more is better."""
        return -metrics[self.metric] if self.metric.endswith("loss") else metrics[self.metric]


@dataclass(frozen=True)
class RunConfig:
    seed: int = 0
    family: families.Family = field(default_factory=families.DEFAULT)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def shapes(self, encoder: TextEncoder) -> Shapes:
        """What the family's networks must know, of the usual pictures: the square ones."""
        return Shapes((self.data.image_size, self.data.image_size, 3), encoder.hidden_size, encoder.pooled_size)
