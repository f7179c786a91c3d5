"""One stream of [text tokens; image patches] through a transformer with adaptive norms.

Rotary 2-D positions on the patches, QK-norm, adaptive RMS norms from time and pooled text (DiT, arXiv 2212.09748;
single stream: arXiv 2511.22699; QK-norm: arXiv 2302.05442)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.conditioning import Conditioning
from jaxgen.nn.attention import Attention, rotary_2d
from jaxgen.nn.layers import MLP, Linear, RMSNorm, dropout, modulate, patchify, unpatchify
from jaxgen.text.features import TextFeatures


@register("transformer")
@dataclass(frozen=True)
class Transformer:
    patch: int = 4
    width: int = 256
    depth: int = 8
    head_dim: int = 64
    mlp_ratio: int = 4
    refiner: int = 1  # transformer blocks over the text tokens alone, before they join the stream
    dropout: float = 0.0
    remat: bool = False  # recompute each block's activations in the backward pass: less memory, a third more work

    def validate(self) -> None:
        if self.width % self.head_dim or self.head_dim % 4:
            raise UserError(
                f"family.network: width={self.width} must be a multiple of head_dim={self.head_dim}, and that one of 4"
            )

    def check_image(self, image: tuple[int, int, int]) -> None:
        if image[0] % self.patch or image[1] % self.patch:
            raise UserError(f"data.image_size={image[0]} is no multiple of family.network.patch={self.patch}")

    def build(self, rngs: nnx.Rngs, shapes: Shapes, out_channels: int) -> nnx.Module:
        return _Transformer(self, shapes, out_channels, rngs)

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """Of one forward pass for one image; norms and activations are not counted."""
        patches = shapes.image[0] * shapes.image[1] // self.patch**2
        stream, w = patches + tokens, self.width
        block = 2 * stream * w * w * (4 + 2 * self.mlp_ratio) + 2 * 2 * stream * stream * w + 2 * 6 * w * w
        text = 2 * tokens * w * (shapes.hidden + self.refiner * (8 * w + 2 * tokens))
        return float(self.depth * block + text + 2 * 2 * patches * w * shapes.image[2] * self.patch**2)


class _Transformer(nnx.Module):
    def __init__(self, c: Transformer, shapes: Shapes, out_channels: int, rngs: nnx.Rngs):
        self.config = c
        pixel = self.config.patch**2
        self.conditioning = Conditioning(shapes.hidden, shapes.pooled, c.width, rngs, refiner=c.refiner)
        self.stem = Linear(shapes.image[2] * pixel, c.width, rngs, axes=(None, "embed"))
        self.blocks = nnx.List([_Block(c, rngs) for _ in range(c.depth)])
        self.norm = RMSNorm(c.width, rngs, learned=False)
        self.modulation = Linear(c.width, 2 * c.width, rngs, axes=("embed", None), zero=True)
        self.head = Linear(c.width, out_channels * pixel, rngs, axes=("embed", None), zero=True)

    def __call__(self, x: jax.Array, t: jax.Array, text: TextFeatures, key: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, C] at times t [B] -> [B, H, W, out_channels]; `key` turns dropout on."""
        c = self.config
        vector, tokens = self.conditioning(t, text, x.dtype)
        patches = patchify(x, c.patch)
        b, rows, columns, _ = patches.shape
        stream = jnp.concatenate([tokens, self.stem(patches.reshape(b, rows * columns, -1))], axis=1)
        mask = jnp.concatenate([text.mask, jnp.ones((b, rows * columns), bool)], axis=1)
        # Text tokens do not turn: their order is already in the language model's features.
        cos, sin = rotary_2d(rows, columns, c.head_dim)
        still = ((tokens.shape[1], 0), (0, 0))
        rotary = jnp.pad(cos, still, constant_values=1.0), jnp.pad(sin, still)
        keys = jax.random.split(key, c.depth) if key is not None else [None] * c.depth

        def apply(block, stream, key):
            return block(stream, vector, mask, rotary, key)

        run = nnx.remat(apply) if c.remat else apply
        for block, block_key in zip(self.blocks, keys, strict=True):
            stream = run(block, stream, block_key)
        scale, shift = jnp.split(self.modulation(vector), 2, axis=-1)
        out = self.head(modulate(self.norm(stream[:, tokens.shape[1] :]), scale, shift))
        return unpatchify(out.reshape(b, rows, columns, -1), c.patch)


class _Block(nnx.Module):
    def __init__(self, c: Transformer, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(c.width, rngs, learned=False), RMSNorm(c.width, rngs, learned=False)
        self.attention = Attention(c.width, c.head_dim, rngs)
        self.mlp = MLP(c.width, c.mlp_ratio * c.width, rngs, zero=True, dropout=c.dropout)
        self.modulation = Linear(c.width, 4 * c.width, rngs, axes=("embed", None), zero=True)
        self.dropout = c.dropout

    def __call__(self, x: jax.Array, vector: jax.Array, mask: jax.Array, rotary, key: jax.Array | None) -> jax.Array:
        scale1, shift1, scale2, shift2 = jnp.split(self.modulation(vector), 4, axis=-1)
        first, second = jax.random.split(key) if key is not None else (None, None)
        attended = self.attention(modulate(self.norm1(x), scale1, shift1), mask=mask, rotary=rotary)
        x = x + dropout(attended, self.dropout, first)
        return x + self.mlp(modulate(self.norm2(x), scale2, shift2), second)
