"""The conditional variational autoencoder: q(z | x, text), p(z | text), p(x | z, text), latents in a ladder of groups.

Trained on the evidence lower bound (Kingma and Welling, arXiv 1312.6114), in bits a dimension; the network lays out prior
and posterior (vae_networks.py). With one group and a standard normal prior it is that paper's:

    Vae(network=Ladder(groups=(0, 0, 0, 1)), prior="standard")"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Family, Losses, SampleSettings, Shapes, circle, noise, to_uint8
from jaxgen.families.vae_networks import Gaussian, Ladder
from jaxgen.nn.module import Params, bind, init_params, logical_axes
from jaxgen.text.features import TextFeatures

LEVEL = 2 / 255  # from one of 256 levels to the next, in [-1, 1]
START = math.log(0.1)  # of the likelihood's log scale
# A Gaussian narrower than a level would report more than it says of the level.
MIN_SCALE = {"discretised_logistic": 1e-3, "gaussian": LEVEL}


@register("vae")
@dataclass(frozen=True)
class Vae(Family):
    samplers: ClassVar = ("prior",)

    network: Ladder = field(default_factory=Ladder)
    prior: Literal["learned", "standard"] = "learned"  # given the text and the groups above, or N(0, 1)
    likelihood: Literal["discretised_logistic", "gaussian"] = "discretised_logistic"
    scale: Literal["channel", "pixel"] = "channel"  # which a learned scale of the likelihood belongs to
    # The loss takes a smaller scale for this one, which the reported bits do not: errors too small to see then cost little,
    # and latents need not be exact to a hair, which would leave most of the prior unvisited.
    loss_min_scale: float = 0.0
    kl_weight: float = 1.0  # the beta of arXiv 1804.03599 and its kin
    free_bits: float = 0.0  # that each group may hold of a picture at no cost (arXiv 1606.04934)
    # Share of the KL's gradient that the posterior takes; the prior takes all of its own. Below 1 the prior learns the
    # posterior sooner than that one gives way, with no warm-up of kl_weight (KL balancing, arXiv 2010.02193).
    kl_to_posterior: float = 1.0

    def validate(self) -> None:
        for name in ("loss_min_scale", "kl_weight", "free_bits", "kl_to_posterior"):
            if getattr(self, name) < 0:
                raise UserError(f"family.{name}={getattr(self, name)} cannot be negative")

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        self.network.check_image(shapes.image)
        params = init_params(self._build(shapes), key)
        if self.scale == "channel":
            params["log_scale"] = jnp.zeros(shapes.image[2])
        return {"generator": params}

    def logical_axes(self, shapes: Shapes) -> Params:
        axes = logical_axes(self._build(shapes))
        if self.scale == "channel":
            axes["log_scale"] = (None,)
        return {"generator": axes}

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """The loss is the bound in bits a dimension, with what kl_weight, free_bits and loss_min_scale make of it.

        Metrics: the plain bound `bits_per_dim` and its parts `bits_per_dim_reconstruction` and `bits_per_dim_kl`; `mse` of
        the reconstruction; `kl_1`, `kl_2`, …: bits of a picture in each group of latents, coarsest first. One that stays
        near 0 has collapsed: the picture does not depend on it."""
        image, text = batch["image"], batch["text"]
        kls, penalties = [], []

        def draw(k: int, prior: Gaussian, posterior: Gaussian) -> jax.Array:
            toward_prior = jnp.mean(divergence(stop_gradient(posterior), prior))
            toward_posterior = jnp.mean(divergence(posterior, stop_gradient(prior)))
            kl = toward_prior + self.kl_to_posterior * (toward_posterior - stop_gradient(toward_posterior))
            kls.append(kl)
            penalties.append(jnp.maximum(kl, self.free_bits * math.log(2)))
            eps = jax.random.normal(jax.random.fold_in(key, k), posterior.mean.shape)
            return posterior.mean + jnp.exp(posterior.log_scale) * eps

        mean, log_scale = self._run(params, image.shape[1:], text, draw, image)
        likelihood = LIKELIHOODS[self.likelihood]
        # The scale always learns its own best value, and the mean by the scale that the loss takes.
        wide = log_scale if self.loss_min_scale == 0 else jnp.maximum(log_scale, math.log(self.loss_min_scale))
        exact = -jnp.mean(likelihood(image, stop_gradient(mean), log_scale))
        training = -jnp.mean(likelihood(image, mean, stop_gradient(wide)))
        dims = math.prod(image.shape[1:])
        loss = training + (exact - stop_gradient(exact)) + self.kl_weight * sum(penalties) / dims
        metrics = {
            "bits_per_dim": (exact + sum(kls) / dims) / math.log(2),
            "bits_per_dim_reconstruction": exact / math.log(2),
            "bits_per_dim_kl": sum(kls) / dims / math.log(2),
            "mse": jnp.mean(jnp.square(mean - image)),
        }
        metrics |= {f"kl_{k + 1}": kl / math.log(2) for k, kl in enumerate(kls)}
        return {"generator": (loss / math.log(2), metrics)}

    def sample(
        self,
        params: Params,
        frozen: Params,
        text: TextFeatures,
        null_text: TextFeatures,
        key: jax.Array,
        settings: SampleSettings,
    ) -> jax.Array:
        """uint8 [B, H, W, C]: the likelihood's mean for latents of the prior, whose scales `temperature` multiplies.

        Guidance moves each prior's mean to null + guidance_scale (mean - null); its scale stays. See Family.sample."""
        return self._picture(params, text, null_text, settings, _eps(key))

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
        """uint8 [frames, B, H, W, C]: the coarsest latents go once round a circle through those of `sample`, where they
        end; what is drawn at random below them stays. See Family.trace."""
        own, other = _eps(key), _eps(jax.vmap(lambda k: jax.random.fold_in(k, 1 << 16))(key))

        def frame(angle: jax.Array) -> jax.Array:
            def walk(k: int, shape: tuple[int, ...]) -> jax.Array:
                if k >= self.network.top_groups:
                    return own(k, shape)
                return jnp.cos(angle) * own(k, shape) + jnp.sin(angle) * other(k, shape)

            return self._picture(params, text, null_text, settings, walk)

        return jax.lax.map(frame, circle(frames))

    def reconstruct(
        self, params: Params, frozen: Params, image: jax.Array, text: TextFeatures, key: jax.Array | None = None
    ) -> jax.Array:
        """float32 [B, H, W, C]: pictures (of the same shape, in [-1, 1]) through the posterior, each drawn by its own key of
        `key` [B], or through the posterior's means."""

        def draw(k: int, prior: Gaussian, posterior: Gaussian) -> jax.Array:
            if key is None:
                return posterior.mean
            return posterior.mean + jnp.exp(posterior.log_scale) * _eps(key)(k, posterior.mean.shape[1:])

        return self._run(params, image.shape[1:], text, draw, image)[0]

    def flops(self, shapes: Shapes, tokens: int) -> float:
        return self.network.flops(shapes, tokens)

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        return 3.0 * self.network.train_flops(shapes, tokens)

    def _picture(
        self, params: Params, text: TextFeatures, null_text: TextFeatures, settings: SampleSettings, eps: Any
    ) -> jax.Array:
        """uint8 [B, H, W, C] from standard normal eps(k, shape) for each group k."""

        def drawn(k: int, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
            return mean + settings.temperature * jnp.exp(log_scale) * eps(k, mean.shape[1:])

        def plain() -> jax.Array:
            return self._run(params, settings.image, text, lambda k, prior, _: drawn(k, *prior))[0]

        def guided() -> jax.Array:
            def draw(k: int, prior: Gaussian, _: None) -> jax.Array:
                mean, null = jnp.split(prior.mean, 2)
                z = drawn(k, null + settings.guidance_scale * (mean - null), jnp.split(prior.log_scale, 2)[0])
                return jnp.concatenate([z, z])

            both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text, null_text)
            return jnp.split(self._run(params, settings.image, both, draw)[0], 2)[0]

        return to_uint8(jax.lax.cond(settings.guidance_scale != 1.0, guided, plain))

    def _build(self, shapes: Shapes):
        out = shapes.image[2] * (2 if self.scale == "pixel" else 1)
        return lambda rngs: self.network.build(rngs, shapes, out, self.prior == "learned")

    def _run(
        self, params: Params, shape: tuple[int, ...], text: TextFeatures, draw: Any, image: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The likelihood's mean [B, H, W, C] and log scale (of a shape that spreads to it), float32."""
        out = bind(self._build(Shapes.of(shape, text)), params["generator"])(text, draw, image).astype(jnp.float32)
        if self.scale == "channel":
            mean, log_scale = out, params["generator"]["log_scale"].astype(jnp.float32)
        else:
            mean, log_scale = jnp.split(out, 2, axis=-1)
        return mean, jnp.maximum(log_scale + START, math.log(MIN_SCALE[self.likelihood]))


def divergence(q: Gaussian, p: Gaussian) -> jax.Array:
    """KL(q || p) in nats, float32 [B]."""
    variance = jnp.exp(2 * (q.log_scale - p.log_scale))
    offset = (q.mean - p.mean) * jnp.exp(-p.log_scale)
    kl = p.log_scale - q.log_scale + 0.5 * (variance + jnp.square(offset) - 1.0)
    return jnp.sum(kl, axis=tuple(range(1, kl.ndim)))


def discretised_logistic(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """log of the probability of each value of x, one of 256 levels in [-1, 1], under a logistic distribution whose mass
    beyond the ends belongs to the first and the last level (Salimans et al., arXiv 1701.05517, section 2.1)."""
    low, high = x < -1 + LEVEL / 2, x > 1 - LEVEL / 2
    above, below = ((x - mean + side * LEVEL / 2) * jnp.exp(-log_scale) for side in (1, -1))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no difference of like numbers, however far out.
    between = jnp.log(-jnp.expm1(-LEVEL * jnp.exp(-log_scale)))
    return (
        jnp.where(high, 0.0, jax.nn.log_sigmoid(above))
        + jnp.where(low, 0.0, jax.nn.log_sigmoid(-below))
        + jnp.where(low | high, 0.0, between)
    )


def gaussian(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """log of the density of each value of x times the width of a level: to be compared with a probability."""
    offset = (x - mean) * jnp.exp(-log_scale)
    return -0.5 * jnp.square(offset) - log_scale - 0.5 * math.log(2 * math.pi) + math.log(LEVEL)


LIKELIHOODS = {"discretised_logistic": discretised_logistic, "gaussian": gaussian}


def _eps(key: jax.Array) -> Any:
    """eps(k, shape): standard normal [B, *shape] for group k, a row from each key of `key` [B]."""
    return lambda k, shape: noise(jax.vmap(lambda one: jax.random.fold_in(one, k))(key), shape)
