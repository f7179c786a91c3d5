"""A whole run, as a configuration file's get_config() returns it: one section a room."""

from dataclasses import dataclass, field

from jaxgen.data.config import DataConfig
from jaxgen.errors import UserError
from jaxgen.families.flow import Flow
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.text.config import TextConfig
from jaxgen.train.optimizers import OptimizerConfig


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
    init_from: str | None = None  # another run's workdir (or an exported model) to take the weights from
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
class SampleConfig:
    """How pictures are drawn by default, and which ones while training."""

    prompts: tuple[str, ...] = ()
    every: int = 1000
    num_images: int = 1  # a prompt, on the sheets drawn while training
    num_steps: int = 20
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    sampler: str = "heun"


@dataclass(frozen=True)
class EvalConfig:
    """A metric on `validation` while training; `patience` evaluations without a new best end the run (0: never)."""

    every: int = 0  # steps; 0 is never
    count: int = 200  # prompts
    metric: str = "eval/exact"
    patience: int = 0


@dataclass(frozen=True)
class RunConfig:
    seed: int = 0
    family: Flow = field(default_factory=Flow)
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
