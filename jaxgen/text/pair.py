"""Two text encoders side by side, as SDXL (arXiv 2307.01952) and SD3 (arXiv 2403.03206) read a prompt."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.nn.module import Params
from jaxgen.text.encoder import TextEncoder
from jaxgen.text.features import TextFeatures

Along = Literal["features", "tokens"]


class PairedTextEncoder(TextEncoder):
    """Both read each caption; their pooled vectors are joined, and their hidden states along an axis.

    "features": [B, T, D1 + D2], for encoders whose tokens stand for the same words (SDXL's two CLIPs). "tokens":
    [B, T1 + T2, max(D1, D2)], the narrower one filled up with zeros, real tokens first (SD3's CLIP and T5).
    Token ids are [B, 2 T]: the first encoder's, then the second's, padded to one length."""

    def __init__(self, first: TextEncoder, second: TextEncoder, along: Along = "features"):
        self._parts = (first, second)
        cuts = [encoder.tokenizer.cut for encoder in (first, second)]

        def apply(params: Params, input_ids: jax.Array, attention_mask: jax.Array) -> TextFeatures:
            ids, masks = jnp.split(input_ids, 2, axis=1), jnp.split(attention_mask, 2, axis=1)
            a = first.apply(params["first"], ids[0], masks[0])
            b = second.apply(params["second"], ids[1], masks[1])
            a, b = (_widen(f, cut) for f, cut in zip((a, b), cuts, strict=True))  # what a template took is padding here
            pooled = jnp.concatenate([a.pooled, b.pooled], axis=-1)
            if along == "features":
                return TextFeatures(jnp.concatenate([a.hidden, b.hidden], axis=-1), pooled, a.mask | b.mask)
            width = max(first.hidden_size, second.hidden_size)
            wide = [jnp.pad(f.hidden, ((0, 0), (0, 0), (0, width - f.hidden.shape[-1]))) for f in (a, b)]
            hidden, mask = jnp.concatenate(wide, axis=1), jnp.concatenate([a.mask, b.mask], axis=1)
            order = jnp.argsort(~mask, axis=1, stable=True)
            return TextFeatures(
                jnp.take_along_axis(hidden, order[..., None], axis=1), pooled, jnp.take_along_axis(mask, order, axis=1)
            )

        sizes = (first.hidden_size, second.hidden_size)
        names = "".join([first.fingerprint, second.fingerprint, along])
        super().__init__(
            {"first": first.params, "second": second.params},
            apply,
            first.tokenizer,
            hidden_size=sum(sizes) if along == "features" else max(sizes),
            pooled_size=first.pooled_size + second.pooled_size,
            max_length=max(first.max_length, second.max_length),
            fingerprint=hashlib.sha256(names.encode()).hexdigest(),
        )
        most = max(encoder.lengths[-1] for encoder in self.parts)  # with a template's tokens
        self.lengths = [*(n for n in self.lengths if n < most), most]

    @property
    def parts(self) -> tuple[TextEncoder, ...]:
        return self._parts

    def count(self, captions: Sequence[str]) -> np.ndarray:
        return np.maximum(*(encoder.count(captions) for encoder in self.parts))

    def tokenize(self, captions: Sequence[str], length: int | None = None) -> dict[str, np.ndarray]:
        """{"input_ids", "attention_mask"}: int32 [B, 2 T] each; `length` is T."""
        length = length or self.bucket(int(self.count(captions).max(initial=1)))
        both = [encoder.tokenize(captions, length) for encoder in self.parts]
        return {name: np.concatenate([tokens[name] for tokens in both], axis=1) for name in both[0]}


def _widen(features: TextFeatures, by: int) -> TextFeatures:
    pad = ((0, 0), (0, by))
    return TextFeatures(jnp.pad(features.hidden, (*pad, (0, 0))), features.pooled, jnp.pad(features.mask, pad))
