"""Which language model reads the captions."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.text.adapt import AdaLoRA, Bottleneck, Frozen, Full, LastLayers, LoRA, Prefix
from jaxgen.text.encoder import TextEncoder, load_text_encoder
from jaxgen.text.pair import Along, PairedTextEncoder


@dataclass(frozen=True)
class _Encoder:
    """What load_text_encoder takes."""

    source: str = ""  # a Hub id or a local Hugging Face directory
    subfolder: str | None = None  # of the source
    tokenizer: str | None = None  # a directory of its own; by default the source's
    layers: int | tuple[int, ...] | str = "last"  # also an index of a hidden state, several to join (9,18,27), "average"
    max_length: int | None = None  # tokens; the model's own limit by default
    template: str | None = None  # an instruction around each caption, "… {} …"; what stands before it is cut off again
    where: ClassVar[str] = "text"

    def validate(self) -> None:
        if not self.source:
            raise UserError(f"{self.where}.source is empty: give a Hub id or a directory")
        if self.layers == () or (isinstance(self.layers, str) and self.layers not in ("last", "average")):
            raise UserError(
                f'{self.where}.layers={self.layers!r}: "last", "average", the index of a hidden state, or several: 9,18,27'
            )
        if self.template is not None and self.template.count("{}") != 1:
            raise UserError(f"{self.where}.template={self.template!r} needs {{}} once, where the caption goes")

    def _read(self, mesh: jax.sharding.Mesh | None) -> TextEncoder:
        return load_text_encoder(
            self.source,
            mesh=mesh,
            layers=self.layers,
            max_length=self.max_length,
            subfolder=self.subfolder,
            tokenizer=self.tokenizer,
            template=self.template,
        )


@register("encoder")
@dataclass(frozen=True)
class SecondEncoder(_Encoder):
    """An encoder that reads the captions as well (see pair.py)."""

    along: Along = "features"  # its states beside the first one's, token by token, or behind them as more tokens
    where: ClassVar[str] = "text.second"


@dataclass(frozen=True)
class TextConfig(_Encoder):
    source: str = "sentence-transformers/all-MiniLM-L6-v2"
    second: SecondEncoder | None = None  # on a command line: --config.text.second=encoder, then its fields
    dropout: float = 0.1  # share of captions replaced by the empty one, which guidance needs
    # What of it is trained.
    adapt: Frozen | LastLayers | Full | LoRA | AdaLoRA | Bottleneck | Prefix = field(default_factory=Frozen)
    adapt_learning_rate_scale: float = 0.1  # its learning rate (AdamW's), as a multiple of the generator's
    in_step: bool | None = None  # encode inside the step; by default where there is an accelerator or it is trained

    @property
    def adapted(self) -> bool:
        return not isinstance(self.adapt, Frozen)

    def validate(self) -> None:
        super().validate()
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"text.dropout={self.dropout} must lie in [0, 1)")
        if self.adapt_learning_rate_scale <= 0:
            raise UserError(f"text.adapt_learning_rate_scale={self.adapt_learning_rate_scale} must be positive")
        if self.adapted and self.in_step is False:
            raise UserError("text.in_step=False: an encoder that is trained (text.adapt) reads inside the step; leave it out")
        if self.adapted and self.second is not None:
            raise UserError("text.adapt trains one encoder, not a pair: leave out text.second, or text.adapt")

    def load(self, mesh: jax.sharding.Mesh | None = None) -> TextEncoder:
        """The encoder that reads the captions; raises UserError as load_text_encoder does."""
        encoder = self._read(mesh)
        return encoder if self.second is None else PairedTextEncoder(encoder, self.second._read(mesh), self.second.along)
