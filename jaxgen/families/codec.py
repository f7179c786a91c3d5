"""What turns pictures into latents or tokens and back, and how a family names a trained one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.nn.module import Params
from jaxgen.storage import as_path, read_json

Image = tuple[int, int, int]  # H, W, C


class Codec(Protocol):
    """Pictures into latents and back. A frozen config dataclass, a subclass of this one."""

    def check_image(self, image: Image) -> None:
        """Raises UserError where height and width do not fit."""
        ...

    def latent_shape(self, image: Image) -> Image:
        """(h, w, c) of the latents of pictures (H, W, C)."""
        ...

    def init(self, key: jax.Array, image: Image) -> Params:
        """Fresh float32 parameters; {} where nothing is learned."""
        ...

    def encode(self, params: Params, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """float [B, H, W, C] in [-1, 1] -> latents float32 [B, h, w, c], near unit variance: a draw of the posterior by
        `key`, its mean without one."""
        ...

    def decode(self, params: Params, latent: jax.Array) -> jax.Array:
        """The inverse of `encode`: float32 [B, H, W, C], near [-1, 1]."""
        ...

    def posterior(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """(mean, deviation) of what `encode` draws, float32 [B, h, w, c] each; deviation None where it draws nothing."""
        return self.encode(params, image), None


class TokenCodec(Codec, Protocol):
    """Pictures into tokens and back; a token's latent is its code."""

    @property
    def vocab(self) -> int:
        """How many tokens there are. Raises UserError where latents are continuous."""
        ...

    def tokenize(self, params: Params, image: jax.Array) -> jax.Array:
        """float [B, H, W, C] in [-1, 1] -> int32 [B, h, w], each in [0, vocab)."""
        ...

    def detokenize(self, params: Params, tokens: jax.Array) -> jax.Array:
        """int32 [B, h, w] -> float32 [B, H, W, C]."""
        ...


def draw(mean: jax.Array, deviation: jax.Array | None, key: jax.Array | None) -> jax.Array:
    """float32: a draw of a posterior as `Codec.posterior` gives it, by one key; the mean without a key."""
    mean = mean.astype(jnp.float32)
    return mean if deviation is None or key is None else mean + deviation * jax.random.normal(key, mean.shape)


@register("pretrained")
@dataclass(frozen=True)
class Pretrained(TokenCodec):
    """A trained codec, read from files and not trained any further."""

    # A workdir or an exported directory of an autoencoder's run, a shipped model's name, or a Hugging Face AutoencoderKL's
    # directory.
    source: str = ""
    codec: Codec | None = None  # its configuration, which `resolve` reads from there

    def validate(self) -> None:
        if not self.source and self.codec is None:
            raise UserError("family.codec.source is empty: give an autoencoder's workdir or directory")

    def resolve(self) -> "Pretrained":
        """With the codec's configuration filled in, from `source`. Raises UserError where there is none."""
        return self if self.codec is not None else replace(self, codec=self._read())

    def load(self) -> Params:
        """The codec's weights (a run's newest EMA weights), float32. Raises UserError."""
        from jaxgen.families.autoencoder_kl import AutoencoderKL

        codec = self._read()
        if self.codec is not None and codec != self.codec:
            raise UserError(f"family.codec.source={self.source} is not the autoencoder of this run any more: restore that one")
        if isinstance(codec, AutoencoderKL):
            return codec.load(Path(self.source).expanduser())
        from jaxgen.model import read_trained  # families know nothing of runs but here, where they read one

        return read_trained(self.source)[1]["generator"]

    def _read(self) -> Codec:
        from jaxgen.families.autoencoder import Autoencoder
        from jaxgen.families.autoencoder_kl import CONFIG, AutoencoderKL
        from jaxgen.model import read_config

        self.validate()
        file = as_path(self.source) / CONFIG
        if file.exists() and "_class_name" in (values := read_json(file)):
            return AutoencoderKL.from_hf(values, str(file))
        family: Any = read_config(self.source)[1].family
        if not isinstance(family, Autoencoder):
            kind = getattr(family, "_config_type", type(family).__name__)
            raise UserError(f"family.codec.source={self.source} holds a model of the family {kind}, not an autoencoder")
        return family.network

    @property
    def _codec(self) -> Any:
        if self.codec is None:
            raise ValueError("a Pretrained codec is used before resolve()")
        return self.codec

    def check_image(self, image: Image) -> None:
        self._codec.check_image(image)

    def latent_shape(self, image: Image) -> Image:
        return self._codec.latent_shape(image)

    def init(self, key: jax.Array, image: Image) -> Params:
        return self._codec.init(key, image)

    def encode(self, params: Params, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self._codec.encode(params, image, key)

    def decode(self, params: Params, latent: jax.Array) -> jax.Array:
        return self._codec.decode(params, latent)

    def posterior(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        return self._codec.posterior(params, image)

    @property
    def vocab(self) -> int:
        if not hasattr(self._codec, "tokenize"):
            raise UserError(f"family.codec.source={self.source} has continuous latents, no tokens: name a tokenizer")
        return self._codec.vocab

    def tokenize(self, params: Params, image: jax.Array) -> jax.Array:
        return self._codec.tokenize(params, image)

    def detokenize(self, params: Params, tokens: jax.Array) -> jax.Array:
        return self._codec.detokenize(params, tokens)
