"""Which language model reads the captions."""

from dataclasses import dataclass, field

from jaxgen.errors import UserError
from jaxgen.text.adapt import AdaLoRA, Bottleneck, Frozen, Full, LastLayers, LoRA, Prefix


@dataclass(frozen=True)
class TextConfig:
    source: str = "sentence-transformers/all-MiniLM-L6-v2"  # a Hub id or a local Hugging Face directory
    max_length: int | None = None  # tokens; the model's own limit by default
    dropout: float = 0.1  # share of captions replaced by the empty one, which guidance needs
    adapt: Frozen | LastLayers | Full | LoRA | AdaLoRA | Bottleneck | Prefix = field(
        default_factory=Frozen
    )  # what of it is trained
    adapt_learning_rate_scale: float = 0.1  # its learning rate (AdamW's), as a multiple of the generator's
    in_step: bool | None = None  # encode inside the step; by default where there is an accelerator or it is trained

    @property
    def adapted(self) -> bool:
        return not isinstance(self.adapt, Frozen)

    def validate(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"text.dropout={self.dropout} must lie in [0, 1)")
        if not self.source:
            raise UserError("text.source is empty: give a Hub id or a directory")
        if self.adapt_learning_rate_scale <= 0:
            raise UserError(f"text.adapt_learning_rate_scale={self.adapt_learning_rate_scale} must be positive")
        if self.adapted and self.in_step is False:
            raise UserError("text.in_step=False: an encoder that is trained (text.adapt) reads inside the step; leave it out")
