"""A convolutional autoencoder, trained here: pictures into a few channels at a fraction of the resolution, and back.

Latents are continuous, with a Gaussian posterior held near N(0, 1) (Kingma and Welling, arXiv 1312.6114; as the first stage
of another family: Rombach et al., arXiv 2112.10752), or finite scalars, which are tokens too (fsq.py). The discriminator is
a patch one (Isola et al., arXiv 1611.07004; Esser et al., arXiv 2012.09841); it starts best late: train without it first,
then anew with --config.train.init_from."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax import stop_gradient

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Family, Losses, SampleSettings, Shapes
from jaxgen.families.codec import Image, TokenCodec, draw
from jaxgen.families.fsq import FSQ
from jaxgen.nn.layers import Conv, Linear, RMSNorm, patchify, unpatchify, zeros
from jaxgen.nn.module import Params, bind, dtype_of, init_params, logical_axes, param
from jaxgen.text.features import TextFeatures

MIN_LOG, MAX_LOG = -30.0, 20.0  # of a posterior's variance


@register("kl")
@dataclass(frozen=True)
class KL:
    """A Gaussian for each latent. Latents are handed out shifted and scaled by statistics that training fits beside the
    weights, a pair a channel, so that they have zero mean and unit variance whatever `weight` is."""

    channels: int = 4
    weight: float = 1e-4  # of the divergence from N(0, 1) in nats, spread over the picture's values

    def validate(self) -> None:
        if self.channels < 1 or self.weight < 0:
            raise UserError(
                f"family.network.bottleneck: channels={self.channels} must be at least 1, weight={self.weight} not negative"
            )


@register("convolutional")
@dataclass(frozen=True)
class Convolutional(TokenCodec):
    """Pixels in blocks of `patch` x `patch`, then one level a width, each at half the resolution of the one before; the
    decoder mirrors the encoder. Its factor is patch * 2^(levels - 1)."""

    patch: int = 2
    widths: tuple[int, ...] = (32, 64)
    encoder_blocks: int = 1  # residual blocks, of two convolutions, of each level
    decoder_blocks: int = 2
    bottleneck: KL | FSQ = field(default_factory=KL)

    def validate(self) -> None:
        if self.patch < 1 or not self.widths or min(self.widths) < 1:
            raise UserError(
                f"family.network: patch={self.patch} and widths={self.widths} want positive numbers, one level or more"
            )
        if min(self.encoder_blocks, self.decoder_blocks) < 0:
            raise UserError("family.network: encoder_blocks and decoder_blocks cannot be negative")

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.widths) - 1)

    def check_image(self, image: Image) -> None:
        if image[0] % self.factor or image[1] % self.factor:
            raise UserError(
                f"data.image_size={image[0]} is no multiple of {self.factor}, by which the autoencoder shrinks pictures"
            )

    def latent_shape(self, image: Image) -> Image:
        return image[0] // self.factor, image[1] // self.factor, self.bottleneck.channels

    def init(self, key: jax.Array, image: Image) -> Params:
        self.check_image(image)
        return init_params(self.build(image[2]), key)

    def build(self, channels: int):
        return lambda rngs: _Autoencoder(self, channels, rngs)

    def encode(self, params: Params, image: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """float32 [B, h, w, c]; see Codec.encode. Of an FSQ bottleneck the codes, as a uniform use of them would scale them."""
        return draw(*self.posterior(params, image), key)

    def posterior(self, params: Params, image: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        found = self._bind(params, image.shape[3]).encoder(image.astype(dtype_of(params))).astype(jnp.float32)
        shift, scale = self._statistics(params)
        if isinstance(self.bottleneck, FSQ):
            return (self.bottleneck.quantise(found) - shift) / scale, None
        mean, log = _gaussian(found)
        return (mean - shift) / scale, jnp.exp(0.5 * log) / scale

    def decode(self, params: Params, latent: jax.Array) -> jax.Array:
        """float32 [B, H, W, C]; see Codec.decode. With an FSQ bottleneck latents are rounded to the nearest codes."""
        shift, scale = self._statistics(params)
        code = latent.astype(jnp.float32) * scale + shift
        return self._decode(params, self.bottleneck.nearest(code) if isinstance(self.bottleneck, FSQ) else code)

    @property
    def vocab(self) -> int:
        return self._fsq.vocab

    def tokenize(self, params: Params, image: jax.Array) -> jax.Array:
        found = self._bind(params, image.shape[3]).encoder(image.astype(dtype_of(params)))
        return self._fsq.tokens(self._fsq.quantise(found))

    def detokenize(self, params: Params, tokens: jax.Array) -> jax.Array:
        return self._decode(params, self._fsq.codes(tokens))

    def autoencode(self, params: Params, image: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(reconstruction float32 [B, H, W, C] from a draw of the posterior, what the bottleneck gave: "codes", or "mean" and
        "log" of the variance, float32 [B, h, w, c] each and not scaled)."""
        found = self._bind(params, image.shape[3]).encoder(image.astype(dtype_of(params))).astype(jnp.float32)
        if isinstance(self.bottleneck, FSQ):
            codes = self.bottleneck.quantise(found)
            return self._decode(params, codes), {"codes": codes}
        mean, log = _gaussian(found)
        return self._decode(params, draw(mean, jnp.exp(0.5 * log), key)), {"mean": mean, "log": log}

    def flops(self, image: Image) -> float:
        """Of encoding and decoding one picture; norms and activations are not counted."""
        area, pixel = image[0] * image[1] // self.patch**2, image[2] * self.patch**2
        latent = self.bottleneck.channels
        total = 2 * 2 * 9 * pixel * self.widths[0] * area
        below = 0
        for width in self.widths:
            area, total = (area // 4, total + 2 * 2 * below * width * area) if below else (area, total)
            total += 2 * (self.encoder_blocks + self.decoder_blocks) * 2 * 9 * width**2 * area
            below = width
        found = latent if isinstance(self.bottleneck, FSQ) else 2 * latent
        return float(total + 2 * 9 * (latent + found) * below * area)

    @property
    def _fsq(self) -> FSQ:
        if not isinstance(self.bottleneck, FSQ):
            raise UserError("family.codec is an autoencoder of continuous latents: tokens want one whose bottleneck is fsq")
        return self.bottleneck

    def _statistics(self, params: Params) -> tuple[Any, Any]:
        if isinstance(self.bottleneck, FSQ):
            return self.bottleneck.statistics
        return params["shift"].astype(jnp.float32), jnp.exp(params["log_scale"].astype(jnp.float32))

    def _decode(self, params: Params, code: jax.Array) -> jax.Array:
        # Any number of channels describes the module's structure; the arrays bound to it say the true one.
        return self._bind(params, 3).decoder(code.astype(dtype_of(params))).astype(jnp.float32)

    def _bind(self, params: Params, channels: int) -> Any:
        return bind(self.build(channels), params)


def _gaussian(found: jax.Array) -> tuple[jax.Array, jax.Array]:
    mean, log = jnp.split(found, 2, axis=-1)
    return mean, jnp.clip(log, MIN_LOG, MAX_LOG)


class _Autoencoder(nnx.Module):
    def __init__(self, c: Convolutional, channels: int, rngs: nnx.Rngs):
        self.encoder, self.decoder = _Encoder(c, channels, rngs), _Decoder(c, channels, rngs)
        if isinstance(c.bottleneck, KL):
            self.shift = param(zeros, rngs, (c.bottleneck.channels,), (None,))
            self.log_scale = param(zeros, rngs, (c.bottleneck.channels,), (None,))


class _Encoder(nnx.Module):
    def __init__(self, c: Convolutional, channels: int, rngs: nnx.Rngs):
        self.patch = c.patch
        self.stem = Conv(channels * c.patch**2, c.widths[0], rngs)
        self.levels = nnx.List([nnx.List([_Block(w, rngs) for _ in range(c.encoder_blocks)]) for w in c.widths])
        pairs = zip(c.widths, c.widths[1:], strict=False)
        self.shrink = nnx.List([Linear(4 * a, b, rngs, axes=("in_channels", "channels")) for a, b in pairs])
        self.norm = RMSNorm(c.widths[-1], rngs)
        self.head = Conv(c.widths[-1], c.bottleneck.channels * (2 if isinstance(c.bottleneck, KL) else 1), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(patchify(x, self.patch))
        for i, blocks in enumerate(self.levels):
            if i:
                x = self.shrink[i - 1](patchify(x, 2))
            for block in blocks:
                x = block(x)
        return self.head(jax.nn.silu(self.norm(x)))


class _Decoder(nnx.Module):
    def __init__(self, c: Convolutional, channels: int, rngs: nnx.Rngs):
        self.patch = c.patch
        self.stem = Conv(c.bottleneck.channels, c.widths[-1], rngs)
        self.levels = nnx.List([nnx.List([_Block(w, rngs) for _ in range(c.decoder_blocks)]) for w in c.widths])
        pairs = zip(c.widths, c.widths[1:], strict=False)
        self.grow = nnx.List([Linear(b, 4 * a, rngs, axes=("in_channels", "channels")) for a, b in pairs])
        self.norm = RMSNorm(c.widths[0], rngs)
        self.head = Conv(c.widths[0], channels * c.patch**2, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for i in reversed(range(len(self.levels))):
            if i + 1 < len(self.levels):
                x = unpatchify(self.grow[i](x), 2)
            for block in self.levels[i]:
                x = block(x)
        return unpatchify(self.head(jax.nn.silu(self.norm(x))), self.patch)


class _Block(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = RMSNorm(width, rngs), RMSNorm(width, rngs)
        self.conv1, self.conv2 = Conv(width, width, rngs), Conv(width, width, rngs, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        return x + self.conv2(jax.nn.silu(self.norm2(h)))


class _Discriminator(nnx.Module):
    """A score for each patch of the picture, of about 7 * 2^(levels - 1) pixels."""

    def __init__(self, widths: tuple[int, ...], channels: int, rngs: nnx.Rngs):
        pairs = zip((channels, *widths), widths, strict=False)
        self.convs = nnx.List([Conv(4 * a, b, rngs) for a, b in pairs])
        self.head = Conv(widths[-1], 1, rngs, size=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(patchify(x, 2)), 0.2)
        return self.head(x)


@register("autoencoder")
@dataclass(frozen=True)
class Autoencoder(Family):
    """Learns `network`, the codec that other families name in their `codec` section; it draws nothing itself."""

    samplers: ClassVar = ("none",)
    draws: ClassVar = False

    network: Convolutional = field(default_factory=Convolutional)
    l1: float = 1.0  # weight of the mean absolute error
    l2: float = 1.0  # and of the mean squared one
    adversarial: float = 0.0  # weight of the discriminator's opinion; 0 trains none
    adversarial_loss: Literal["hinge", "nonsaturating"] = "hinge"
    discriminator_widths: tuple[int, ...] = (32, 64)  # a level each, at half the resolution of the one before

    def validate(self) -> None:
        if min(self.l1, self.l2, self.adversarial) < 0 or self.l1 + self.l2 == 0:
            raise UserError(
                "family.l1, family.l2 and family.adversarial cannot be negative, and one of the first two is positive"
            )
        if not self.discriminator_widths:
            raise UserError("family.discriminator_widths is empty: one level or more")

    @property
    def groups(self) -> tuple[str, ...]:  # ty: ignore[incompatible-property-override]
        return ("generator", "discriminator") if self.adversarial else ("generator",)

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        factor = 2 ** len(self.discriminator_widths) if self.adversarial else 1
        if shapes.image[0] % factor or shapes.image[1] % factor:
            raise UserError(
                f"data.image_size={shapes.image[0]} is no multiple of {factor}, as family.discriminator_widths asks"
            )
        params = {"generator": self.network.init(key, shapes.image)}
        if self.adversarial:
            params["discriminator"] = init_params(self._discriminator(shapes.image[2]), jax.random.fold_in(key, 1))
        return params

    def logical_axes(self, shapes: Shapes) -> Params:
        axes = {"generator": logical_axes(self.network.build(shapes.image[2]))}
        return axes | ({"discriminator": logical_axes(self._discriminator(shapes.image[2]))} if self.adversarial else {})

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """Reconstruction, the bottleneck's own, and where there is a discriminator each side of the game; the text is not
        read. Metrics: mse, psnr (dB), and kl_bits a picture, or the share of tokens met in the batch (token_share) and how
        many it would be were they met alike (token_perplexity)."""
        image = batch["image"]
        made, found = self.network.autoencode(params["generator"], image, key)
        error = made - image
        mse = jnp.mean(jnp.square(error))
        loss = self.l1 * jnp.mean(jnp.abs(error)) + self.l2 * mse
        metrics = {"mse": mse, "psnr": 10.0 * jnp.log10(4.0 / mse)}
        if isinstance(self.network.bottleneck, KL):
            mean, log = found["mean"], found["log"]
            nats = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(log) - 1.0 - log) / image.shape[0]
            loss += self.network.bottleneck.weight * nats / math.prod(image.shape[1:])
            loss += _fit(params["generator"], mean, log)
            metrics["kl_bits"] = nats / math.log(2)
        else:
            metrics |= _use(self.network.bottleneck, found["codes"])
        if not self.adversarial:
            return {"generator": (loss, metrics)}
        real, fake = (self._score(params["discriminator"], x) for x in (image, made))
        if self.adversarial_loss == "hinge":
            wish, telling = -fake, jax.nn.relu(1.0 - real) + jax.nn.relu(1.0 + fake)
        else:
            wish, telling = jax.nn.softplus(-fake), jax.nn.softplus(-real) + jax.nn.softplus(fake)
        scores = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
        return {
            "generator": (loss + self.adversarial * jnp.mean(wish), metrics),
            "discriminator": (jnp.mean(telling), scores),
        }

    def roundtrip(self, params: Params, frozen: Params, image: jax.Array) -> jax.Array:
        tree = params["generator"]
        return self.network.decode(tree, self.network.encode(tree, image))

    def sample(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
    ) -> jax.Array:
        raise UserError(
            "this model is an autoencoder and draws nothing from text: another family does, in its latents, with "
            "--config.family.codec=pretrained --config.family.codec.source=THIS_WORKDIR"
        )

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
        return self.sample(params, frozen, text, null_text, key, settings)

    def flops(self, shapes: Shapes, tokens: int) -> float:
        return self.network.flops(shapes.image)

    def _discriminator(self, channels: int):
        return lambda rngs: _Discriminator(self.discriminator_widths, channels, rngs)

    def _score(self, params: Params, x: jax.Array) -> jax.Array:
        network: Any = bind(self._discriminator(x.shape[3]), params)
        return network(x.astype(dtype_of(params))).astype(jnp.float32)


def _fit(params: Params, mean: jax.Array, log: jax.Array) -> jax.Array:
    """0, with a gradient that draws the statistics towards those of the batch's latents and moves nothing else."""
    mean, log = stop_gradient((mean, log))
    centre = jnp.mean(mean, axis=(0, 1, 2))
    variance = jnp.mean(jnp.square(mean - centre) + jnp.exp(log), axis=(0, 1, 2))
    shift, log_scale = params["shift"].astype(jnp.float32), params["log_scale"].astype(jnp.float32)
    off = jnp.sum(jnp.square(shift - centre) + jnp.square(log_scale - 0.5 * jnp.log(variance)))
    return off - stop_gradient(off)


def _use(fsq: FSQ, codes: jax.Array) -> dict[str, jax.Array]:
    counts = jnp.zeros(fsq.vocab).at[fsq.tokens(stop_gradient(codes)).reshape(-1)].add(1.0)
    share = counts / jnp.sum(counts)
    entropy = -jnp.sum(share * jnp.log(jnp.where(share > 0, share, 1.0)))
    return {"token_share": jnp.mean(counts > 0), "token_perplexity": jnp.exp(entropy)}
