"""Pictures token by token: a transformer over [text tokens; picture tokens] gives the probability of each.

`order` "raster": row by row, each token given the text and those before it (iGPT, Chen et al., ICML 2020; arXiv 2102.12092,
2406.06525), which is also an exact likelihood. "masked": any tokens given any others, drawn in few rounds, the surest first
(MaskGIT, arXiv 2202.04200)."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Family, Losses, SampleSettings, Shapes, to_uint8
from jaxgen.families.codec import Image, Pretrained
from jaxgen.families.palette import Palette
from jaxgen.families.transformer import TokenTransformer
from jaxgen.nn.module import Params, bind, dtype_of, init_params, logical_axes
from jaxgen.text.features import TextFeatures
from jaxgen.text.generate import choose


@register("autoregressive")
@dataclass(frozen=True)
class Autoregressive(Family):
    """Settings of drawing that mean something: guidance (on logits; t is the share of tokens or rounds to come), temperature,
    top_k, top_p, and num_steps where masked: more than there are tokens are as many as there are."""

    codec: Pretrained | Palette = field(default_factory=Palette)
    network: TokenTransformer = field(default_factory=TokenTransformer)
    order: Literal["raster", "masked"] = "raster"
    label_smoothing: float = 0.0  # share of the target's probability that is spread over all tokens
    choice_temperature: float = 4.5  # masked: of the noise on which tokens are surest, times temperature, falling to 0

    @property
    def samplers(self) -> tuple[str, ...]:  # ty: ignore[incompatible-property-override]
        return (self.order,)

    def validate(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(f"family.label_smoothing={self.label_smoothing} is a share: give a number from 0 to below 1")
        if self.choice_temperature < 0:
            raise UserError(f"family.choice_temperature={self.choice_temperature} cannot be negative")

    def resolve(self) -> Self:
        resolved = self if isinstance(self.codec, Palette) else dataclasses.replace(self, codec=self.codec.resolve())
        _ = resolved.codec.vocab  # raises where it has none
        return resolved

    def init_frozen(self, shapes: Shapes) -> Params:
        return {} if isinstance(self.codec, Palette) else {"codec": self.codec.init(jax.random.key(0), shapes.image)}

    def load_frozen(self) -> Params:
        return {} if isinstance(self.codec, Palette) else {"codec": self.codec.load()}

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        self.codec.check_image(shapes.image)
        return {"generator": init_params(self._build(self._inner(shapes)), key)}

    def logical_axes(self, shapes: Shapes) -> Params:
        return {"generator": logical_axes(self._build(self._inner(shapes)))}

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """The cross-entropy in nats a token, where masked of the masked ones; metrics: bits_per_token, without the smoothing,
        and accuracy, the share of tokens that are the likeliest."""
        text, (mask_key, dropout_key) = batch["text"], jax.random.split(key)
        grid = batch["tokens"] if "tokens" in batch else self._tokenize(frozen, batch["image"])
        tokens = grid.reshape(len(grid), -1).astype(jnp.int32)
        counts = jnp.ones(tokens.shape, bool) if self.order == "raster" else draw_mask(mask_key, *tokens.shape)
        inputs = self._shifted(tokens) if self.order == "raster" else jnp.where(counts, self.codec.vocab, tokens)
        log_p = jax.nn.log_softmax(self._logits(params, grid.shape[1:], inputs, text, dropout_key))
        mean = lambda a: jnp.sum(jnp.where(counts, a, 0.0)) / jnp.sum(counts)  # noqa: E731
        nats = -mean(_pick(log_p, tokens))
        loss = (1.0 - self.label_smoothing) * nats - self.label_smoothing * mean(jnp.mean(log_p, axis=-1))
        accuracy = mean(jnp.argmax(log_p, axis=-1) == tokens)
        return {"generator": (loss, {"bits_per_token": nats / math.log(2), "accuracy": accuracy})}

    def precompute(self, frozen: Params, image: jax.Array) -> dict[str, jax.Array]:
        """{"tokens": int32 [B, h, w]} of a trained codec; see Family.precompute."""
        return {} if isinstance(self.codec, Palette) else {"tokens": self._tokenize(frozen, image)}

    def log_likelihood(self, params: Params, frozen: Params, image: jax.Array, text: TextFeatures) -> jax.Array:
        """float32 [B]: ln p(the tokens of the picture | its caption), of float [B, H, W, C] in [-1, 1] and B captions.

        Raises UserError where tokens are drawn in no order."""
        return self._log_likelihood(params, self._tokenize(frozen, image), text)

    def rank_captions(self, params: Params, frozen: Params, image: jax.Array, text: TextFeatures) -> jax.Array:
        """int32 [N]: N captions from the one that makes the picture, float [H, W, C] in [-1, 1], likeliest to the least."""
        grid = jnp.repeat(self._tokenize(frozen, image[None]), len(text.pooled), axis=0)
        return jnp.argsort(-self._log_likelihood(params, grid, text)).astype(jnp.int32)

    def sample(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
    ) -> jax.Array:
        """uint8 [B, H, W, C]; see Family.sample."""
        return self._picture(frozen, self.draw(params, text, null_text, key, settings)[0], settings.image)

    def trace(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
        frames: int,
    ) -> jax.Array:
        """uint8 [frames, B, H, W, C]: the tokens drawn so far at their places in the finished picture, grey elsewhere."""
        tokens, when, rounds = self.draw(params, text, null_text, key, settings)
        picture = self._picture(frozen, tokens, settings.image)
        rows, columns = self._grid(settings.image)
        down = jnp.arange(settings.image[0]) * rows // settings.image[0]
        across = jnp.arange(settings.image[1]) * columns // settings.image[1]
        at = when.reshape(-1, rows, columns)[:, down][:, :, across]
        bounds = jnp.round(jnp.linspace(0, rounds, frames + 1))[1:]
        return jnp.where((at < bounds[:, None, None, None])[..., None], picture, to_uint8(jnp.zeros(())))

    def draw(
        self, params: Params, text: TextFeatures, null_text: TextFeatures, key: jax.Array, settings: SampleSettings
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(tokens int32 [B, N], the round in which each was drawn, int32 [B, N], the number of rounds)."""
        draw = self._raster if self.order == "raster" else self._masked
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text, null_text)

        def plain() -> Any:
            return draw(params, text, key, settings, lambda logits, t: logits, 1)

        def guided() -> Any:
            def guide(logits: jax.Array, t: jax.Array) -> jax.Array:
                inside = (t >= settings.guidance_low) & (t <= settings.guidance_high)
                given, null = jnp.split(logits, 2)
                return null + jnp.where(inside, settings.guidance_scale, 1.0) * (given - null)

            return draw(params, both, key, settings, guide, 2)

        return jax.lax.cond(settings.guidance_scale != 1.0, guided, plain)

    def _raster(
        self, params: Params, text: TextFeatures, keys: jax.Array, settings: SampleSettings, guide: Any, copies: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        grid = self._grid(settings.image)
        network, dtype = self._network(params, grid, text)
        begun, cache = network.begin(text, dtype)
        count = math.prod(grid)

        def step(i: jax.Array, state: Any) -> Any:
            tokens, last, cache = state
            logits, cache = network.step(jnp.tile(last, copies), i, begun, cache)
            logits = guide(logits.astype(jnp.float32), 1.0 - i / count)
            now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            token = _choose(logits, now, settings)
            return tokens.at[:, i].set(token), token, cache

        start = jnp.full(keys.shape, self.codec.vocab, jnp.int32)
        tokens = jnp.zeros((*keys.shape, count), jnp.int32)
        tokens, _, _ = jax.lax.fori_loop(0, count, step, (tokens, start, cache))
        return tokens, jnp.broadcast_to(jnp.arange(count), tokens.shape), jnp.int32(count)

    def _masked(
        self, params: Params, text: TextFeatures, keys: jax.Array, settings: SampleSettings, guide: Any, copies: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        grid = self._grid(settings.image)
        count = math.prod(grid)
        rounds = jnp.minimum(settings.num_steps, count)

        def step(k: jax.Array, state: Any) -> Any:
            tokens, when, left = state
            hidden = when == count
            inputs = jnp.tile(jnp.where(hidden, self.codec.vocab, tokens), (copies, 1))
            logits = guide(self._logits(params, grid, inputs, text), 1.0 - k / rounds)
            draws = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, k), count + 1))(keys)
            drawn = _choose(logits.reshape(-1, self.codec.vocab), draws[:, 1:].reshape(-1), settings).reshape(tokens.shape)
            sure = _pick(jax.nn.log_softmax(logits), drawn)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, (count,)))(draws[:, 0])
            sure += self.choice_temperature * settings.temperature * (1.0 - (k + 1) / rounds) * noise
            left = masked_after(k, rounds, count, left)
            rank = jnp.argsort(jnp.argsort(jnp.where(hidden, sure, jnp.inf), axis=-1), axis=-1)
            taken = hidden & (rank >= left)
            return jnp.where(taken, drawn, tokens), jnp.where(taken, k, when), left

        tokens = jnp.zeros((*keys.shape, count), jnp.int32)
        state = tokens, jnp.full_like(tokens, count), jnp.int32(count)  # no round has the number `count`
        tokens, when, _ = jax.lax.fori_loop(0, rounds, step, state)
        return tokens, when, rounds

    def flops(self, shapes: Shapes, tokens: int) -> float:
        """See Family.flops: one token after the other with a cache is one pass, too. The codec's are not counted."""
        return self.network.flops(self._inner(shapes), tokens, self.codec.vocab)

    def _log_likelihood(self, params: Params, grid: jax.Array, text: TextFeatures) -> jax.Array:
        if self.order != "raster":
            raise UserError("a likelihood needs tokens in an order: train with family.order=raster")
        tokens = grid.reshape(len(grid), -1)
        log_p = jax.nn.log_softmax(self._logits(params, grid.shape[1:], self._shifted(tokens), text))
        return jnp.sum(_pick(log_p, tokens), axis=-1)

    def _grid(self, image: Image) -> tuple[int, int]:
        rows, columns, _ = self.codec.latent_shape(image)
        return rows, columns

    def _tokenize(self, frozen: Params, image: jax.Array) -> jax.Array:
        return self.codec.tokenize(frozen.get("codec", {}), image)

    def _picture(self, frozen: Params, tokens: jax.Array, image: Image) -> jax.Array:
        """uint8 [B, H, W, C] of tokens [B, N]."""
        return to_uint8(self.codec.detokenize(frozen.get("codec", {}), tokens.reshape(-1, *self._grid(image))))

    def _shifted(self, tokens: jax.Array) -> jax.Array:
        """What stands before each token: the start, then all but the last."""
        return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self.codec.vocab)

    def _logits(
        self, params: Params, grid: Any, inputs: jax.Array, text: TextFeatures, key: jax.Array | None = None
    ) -> jax.Array:
        """float32 [B, N, vocab], computed in the parameters' dtype."""
        network, dtype = self._network(params, grid, text)
        return network(inputs, text, dtype, key).astype(jnp.float32)

    def _network(self, params: Params, grid: Any, text: TextFeatures) -> tuple[Any, Any]:
        """(the network, the dtype it computes in)."""
        inner = Shapes.of((*grid, 1), text)
        return bind(self._build(inner), params["generator"]), dtype_of(params["generator"])

    def _inner(self, shapes: Shapes) -> Shapes:
        """With rows and columns of tokens in the picture's place."""
        return shapes._replace(image=(*self._grid(shapes.image), 1))

    def _build(self, inner: Shapes):
        return lambda rngs: self.network.build(rngs, inner, self.codec.vocab, self.order == "raster")


def draw_mask(key: jax.Array, batch: int, count: int) -> jax.Array:
    """bool [batch, count]: in each row a random share cos(π u / 2), u uniform in [0, 1], of the tokens, at least one."""
    share_key, place_key = jax.random.split(key)
    share = jnp.cos(0.5 * jnp.pi * jax.random.uniform(share_key, (batch, 1)))
    rank = jnp.argsort(jax.random.uniform(place_key, (batch, count)), axis=-1)
    return rank < jnp.maximum(jnp.ceil(share * count), 1)


def masked_after(k: jax.Array, rounds: jax.Array, count: int, before: jax.Array) -> jax.Array:
    """int32: how many of `count` tokens are still masked after round k = 0, …, rounds - 1, `before` of them before it: a
    cosine's share, but at least one fewer. As the cosine lies above its chord, no round to come goes without."""
    share = jnp.cos(0.5 * jnp.pi * (k + 1) / rounds)
    # Rounded up a little: a cosine just below a whole number is one that should be it.
    return jnp.clip(jnp.floor(count * share + 1e-4).astype(jnp.int32), 0, before - 1)


def _pick(log_p: jax.Array, tokens: jax.Array) -> jax.Array:
    """[..., V] at tokens int [...] -> [...]."""
    return jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]


def _choose(logits: jax.Array, keys: jax.Array, settings: SampleSettings) -> jax.Array:
    """int32 [B] from logits float32 [B, V] and B keys."""
    return choose(logits, keys, *map(jnp.asarray, (settings.temperature, settings.top_k, settings.top_p)))
