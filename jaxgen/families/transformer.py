"""One stream of [text tokens; picture] through a transformer with adaptive norms, the picture in patches or in tokens.

Rotary 2-D positions on the picture, QK-norm, adaptive RMS norms from pooled text and time, where there is one (DiT,
arXiv 2212.09748; single stream: arXiv 2511.22699; QK-norm: arXiv 2302.05442)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.conditioning import Conditioning
from jaxgen.nn.attention import Attention, Cache, rotary_2d
from jaxgen.nn.layers import MLP, Embedding, Linear, RMSNorm, dropout, modulate, patchify, unpatchify
from jaxgen.text.features import TextFeatures


@dataclass(frozen=True)
class Blocks:
    width: int = 256
    depth: int = 8
    head_dim: int = 64
    mlp_ratio: int = 4
    refiner: int = 1  # transformer blocks over the text tokens alone, before they join the stream
    dropout: float = 0.0
    # Recompute activations in the backward pass: True all of each block's, a third more work for the least memory; "dots" all
    # but what products with weights gave, which is most of the work.
    remat: bool | Literal["dots"] = False
    scan: bool = False  # the blocks as one loop over their stacked weights: the same numbers, compiled once for all of them

    def validate(self) -> None:
        if self.width % self.head_dim or self.head_dim % 4:
            raise UserError(
                f"family.network: width={self.width} must be a multiple of head_dim={self.head_dim}, and that one of 4"
            )

    def _flops(self, positions: int, shapes: Shapes, tokens: int) -> float:
        """Of one forward pass for one image without its stem and head; norms and activations are not counted."""
        stream, w = positions + tokens, self.width
        block = 2 * stream * w * w * (4 + 2 * self.mlp_ratio) + 2 * 2 * stream * stream * w + 2 * 6 * w * w
        text = 2 * tokens * w * (shapes.hidden + self.refiner * (8 * w + 2 * tokens))
        return float(self.depth * block + text)


@register("transformer")
@dataclass(frozen=True)
class Transformer(Blocks):
    patch: int = 4

    def check_image(self, image: tuple[int, int, int]) -> None:
        if image[0] % self.patch or image[1] % self.patch:
            raise UserError(f"data.image_size={image[0]} is no multiple of family.network.patch={self.patch}")

    def build(self, rngs: nnx.Rngs, shapes: Shapes, out_channels: int) -> nnx.Module:
        return _Transformer(self, shapes, out_channels, rngs)

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """Of one forward pass for one image; norms and activations are not counted."""
        patches = shapes.image[0] * shapes.image[1] // self.patch**2
        return self._flops(patches, shapes, tokens) + 4.0 * patches * self.width * shapes.image[2] * self.patch**2


@register("token_transformer")
@dataclass(frozen=True)
class TokenTransformer(Blocks):
    """Over the tokens of a picture, of which shapes.image says the rows and columns."""

    def build(self, rngs: nnx.Rngs, shapes: Shapes, vocab: int, causal: bool) -> nnx.Module:
        """causal: text sees text, a token all the text and the tokens before it; else all see all."""
        return _TokenTransformer(self, shapes, vocab, causal, rngs)

    def flops(self, shapes: Shapes, tokens: int, vocab: int) -> float:
        """Of one forward pass for one image; norms and activations are not counted."""
        positions = shapes.image[0] * shapes.image[1]
        return self._flops(positions, shapes, tokens) + 2.0 * positions * self.width * vocab


class _Stream(nnx.Module):
    """What both networks are but for the way into the stream."""

    def __init__(
        self, c: Blocks, shapes: Shapes, stem: Callable[[], nnx.Module], outputs: int, rngs: nnx.Rngs, time: bool = True
    ):
        self.config = c
        self.conditioning = Conditioning(shapes.hidden, shapes.pooled, c.width, rngs, refiner=c.refiner, time=time)
        self.stem: Any = stem()
        self.blocks = nnx.List([_Block(c, rngs) for _ in range(c.depth)])
        self.norm = RMSNorm(c.width, rngs, learned=False)
        self.modulation = Linear(c.width, 2 * c.width, rngs, axes=("embed", None), zero=True)
        self.head = Linear(c.width, outputs, rngs, axes=("embed", None), zero=True)

    def through(
        self, vector: jax.Array, tokens: jax.Array, x: jax.Array, mask: jax.Array, grid: tuple[int, int], key: jax.Array | None
    ) -> jax.Array:
        """Text tokens [B, T, D] and x [B, N, D], a position of the grid each, seen as `mask` says -> x's outputs [B, N, O]."""
        c = self.config
        rotary = rotary_2d(*grid, c.head_dim, still=tokens.shape[1])
        keys: Any = jax.random.split(key, c.depth) if key is not None else [None] * c.depth

        def apply(block, stream, key):
            return block(stream, block.modulation(vector), mask, rotary, key)[0]

        run, stream = apply, jnp.concatenate([tokens, x], axis=1)
        if c.remat:
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if c.remat == "dots" else None
            # In a loop nothing can be merged with what is computed again, and the barrier against it costs speed.
            run = nnx.remat(apply, policy=policy, prevent_cse=not c.scan)
        if c.scan:
            graph, _ = nnx.split(self.blocks[0])
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[nnx.state(block) for block in self.blocks])
            each = lambda stream, at: (run(nnx.merge(graph, at[0]), stream, at[1]), None)  # noqa: E731
            stream, _ = jax.lax.scan(each, stream, (stacked, keys if key is not None else None))
        else:
            for block, block_key in zip(self.blocks, keys, strict=True):
                stream = run(block, stream, block_key)
        return self.finish(stream[:, tokens.shape[1] :], self.modulation(vector))

    def finish(self, x: jax.Array, modulation: jax.Array) -> jax.Array:
        scale, shift = jnp.split(modulation, 2, axis=-1)
        return self.head(modulate(self.norm(x), scale, shift))


class _Transformer(_Stream):
    config: Transformer

    def __init__(self, c: Transformer, shapes: Shapes, out_channels: int, rngs: nnx.Rngs):
        pixel = c.patch**2
        stem = lambda: Linear(shapes.image[2] * pixel, c.width, rngs, axes=(None, "embed"))  # noqa: E731
        super().__init__(c, shapes, stem, out_channels * pixel, rngs)

    def __call__(self, x: jax.Array, t: jax.Array, text: TextFeatures, key: jax.Array | None = None) -> jax.Array:
        """x [B, H, W, C] at times t [B] -> [B, H, W, out_channels]; `key` turns dropout on."""
        vector, tokens = self.conditioning(t, text, x.dtype)
        patches = patchify(x, self.config.patch)
        b, rows, columns, _ = patches.shape
        mask = jnp.concatenate([text.mask, jnp.ones((b, rows * columns), bool)], axis=1)
        out = self.through(vector, tokens, self.stem(patches.reshape(b, rows * columns, -1)), mask, (rows, columns), key)
        return unpatchify(out.reshape(b, rows, columns, -1), self.config.patch)


class Begun(NamedTuple):
    """What drawing token by token needs of the text, apart from the cache."""

    modulations: Sequence[jax.Array]  # of each block
    modulation: jax.Array  # before the head
    mask: jax.Array  # bool [B, T] of the text


class _TokenTransformer(_Stream):
    def __init__(self, c: TokenTransformer, shapes: Shapes, vocab: int, causal: bool, rngs: nnx.Rngs):
        rows, columns, _ = shapes.image
        super().__init__(c, shapes, lambda: _TokenStem(vocab, rows * columns, c.width, rngs), vocab, rngs, time=False)
        self.grid, self.causal = (rows, columns), causal

    def __call__(self, ids: jax.Array, text: TextFeatures, dtype: Any, key: jax.Array | None = None) -> jax.Array:
        """int32 [B, N], of which `vocab` is the start (the mask, where not causal) -> logits [B, N, vocab].

        Row i stands at the i-th position and is about its token: where causal, its input is the one before. `key` turns
        dropout on."""
        vector, tokens = self.conditioning(None, text, dtype)
        mask = jnp.concatenate([text.mask, jnp.ones(ids.shape, bool)], axis=1)
        if self.causal:
            slot = jnp.arange(mask.shape[1])
            mask = mask[:, None, None, :] & ((slot < tokens.shape[1]) | (slot <= slot[:, None]))
        return self.through(vector, tokens, self.stem(ids, 0, dtype), mask, self.grid, key)

    def begin(self, text: TextFeatures, dtype: Any) -> tuple[Begun, list[Cache]]:
        """The text, read once, and the cache with it, for `step`."""
        vector, tokens = self.conditioning(None, text, dtype)
        begun = Begun([block.modulation(vector) for block in self.blocks], self.modulation(vector), text.mask)
        b, t, _ = tokens.shape
        empty = [block.attention.empty_cache(b, t + self.grid[0] * self.grid[1], dtype) for block in self.blocks]
        return begun, self._cached(tokens, begun, empty, 0, jnp.int32(-1))[1]

    def step(self, ids: jax.Array, at: jax.Array, begun: Begun, cache: list[Cache]) -> tuple[jax.Array, list[Cache]]:
        """(logits [B, vocab] of token `at`, the cache for the next) from int32 [B], the token before it or the start."""
        x = self.stem(ids[:, None], at, begun.modulation.dtype)
        x, cache = self._cached(x, begun, cache, begun.mask.shape[1] + at, at)
        return self.finish(x, begun.modulation)[:, 0], cache

    def _cached(
        self, x: jax.Array, begun: Begun, cache: list[Cache], start: jax.Array | int, last: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """x at slots from `start` on through the blocks; it sees the text and the picture as far as its position `last`."""
        seen = jnp.arange(self.grid[0] * self.grid[1]) <= last
        mask = jnp.concatenate([begun.mask, jnp.broadcast_to(seen, (len(x), *seen.shape))], axis=1)
        cut = lambda table: jax.lax.dynamic_slice_in_dim(table, start, x.shape[1])  # noqa: E731
        rotary, after = tuple(map(cut, rotary_2d(*self.grid, self.config.head_dim, still=begun.mask.shape[1]))), []
        for block, modulation, own in zip(self.blocks, begun.modulations, cache, strict=True):
            x, own = block(x, modulation, mask, rotary, cache=own, start=start)
            after.append(own)
        return x, after


class _TokenStem(nnx.Module):
    """A token's vector and its position's: learned too, as where a row ends no rotation tells."""

    def __init__(self, vocab: int, positions: int, width: int, rngs: nnx.Rngs):
        self.tokens, self.positions = Embedding(vocab + 1, width, rngs), Embedding(positions, width, rngs)

    def __call__(self, ids: jax.Array, start: jax.Array | int, dtype: Any) -> jax.Array:
        """int32 [B, n] at positions from `start` on -> [B, n, width]."""
        return (self.tokens(ids) + self.positions(start + jnp.arange(ids.shape[1]))).astype(dtype)


class _Block(nnx.Module):
    def __init__(self, c: Blocks, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(c.width, rngs, learned=False), RMSNorm(c.width, rngs, learned=False)
        self.attention = Attention(c.width, c.head_dim, rngs)
        self.mlp = MLP(c.width, c.mlp_ratio * c.width, rngs, zero=True, dropout=c.dropout)
        self.modulation = Linear(c.width, 4 * c.width, rngs, axes=("embed", None), zero=True)
        self.dropout = c.dropout

    def __call__(
        self,
        x: jax.Array,
        modulation: jax.Array,
        mask: jax.Array,
        rotary: Any,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """modulation: self.modulation's. With a cache x stands at its slots from `start` on; it comes back with x in it."""
        scale1, shift1, scale2, shift2 = jnp.split(modulation, 4, axis=-1)
        first, second = jax.random.split(key) if key is not None else (None, None)
        normed = modulate(self.norm1(x), scale1, shift1)
        if cache is None:
            attended = self.attention(normed, mask=mask, rotary=rotary)
        else:
            attended, cache = self.attention.cached(normed, cache, start, mask=mask, rotary=rotary)
        x = x + dropout(attended, self.dropout, first)
        return x + self.mlp(modulate(self.norm2(x), scale2, shift2), second), cache
