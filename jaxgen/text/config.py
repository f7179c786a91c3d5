"""Which language model reads the captions."""

from dataclasses import dataclass

from jaxgen.errors import UserError


@dataclass(frozen=True)
class TextConfig:
    source: str = "sentence-transformers/all-MiniLM-L6-v2"  # a Hub id or a local Hugging Face directory
    max_length: int | None = None  # tokens; the model's own limit by default
    dropout: float = 0.1  # share of captions replaced by the empty one, which guidance needs
    in_step: bool | None = None  # encode inside the step; by default where there is an accelerator

    def validate(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"text.dropout={self.dropout} must lie in [0, 1)")
        if not self.source:
            raise UserError("text.source is empty: give a Hub id or a directory")
