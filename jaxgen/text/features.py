"""What a text encoder gives to a generator."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextFeatures:
    """Features of a batch of captions.

    hidden: float [B, T, D], one vector a token (padding included; see mask).
    pooled: float [B, P], one vector a caption, as the encoder's own files define it.
    mask:   bool  [B, T], true where a token is real.
    """

    hidden: jax.Array
    pooled: jax.Array
    mask: jax.Array
