"""One-step flow: the average velocity over a stretch of a flow's path, learned with the MeanFlow identity.

Path and velocity v are Flow's. The average velocity u(x_t, r, t) = (integral of v along the path from r to t) / (t - r)
leads from t to r at once, x_r = x_t - (t - r) u. Differentiating (t - r) u by t along the path gives the identity
v = u + (t - r) du/dt with du/dt = v ∂u/∂x + ∂u/∂t (Geng et al., arXiv 2505.13447). The loss is the squared error of the
right side's velocity, du/dt held constant and its v the network's own u(x_t, t, t), so that the right side is a function
of x_t alone (arXiv 2512.02012).

The network predicts a picture, from which u = (x_t - it) / max(t, 0.05) (arXiv 2601.22158). Write x̂(x_t, r, t) for
x_t - t u, which is that picture but for t < 0.05, where it goes over into x_t, so that a path of no length leads nowhere.
With dx̂/dt its derivative along the path t du/dt = v - u - dx̂/dt, and with s = (t - r) / t and t v = x_t - x̂(x_t, t, t) the
right side's own clean picture is

    x_t - t (u + (t - r) du/dt) = x̂ + s (t dx̂/dt - x̂(x_t, r, t) + x̂(x_t, t, t)),

the bracket held constant. It is compared with the picture and weighed as in Flow (at r = t this is Flow's loss), then
adaptively. Nothing is divided by a small t, and a step draws x_r = (1 - s) x_t + s x̂.

Guidance is built in: the network knows the scale w, and v is the guided velocity. Trained from pictures its clean picture is
x + (1 - 1/w) (x̂(x_t, t, t, w, text) - x̂(x_t, t, t, 1, no text)), whose fixed point is guidance by w (arXiv 2512.02012).
With a teacher (a trained Flow), the teacher's guided prediction stands both for x and for x̂(x_t, t, t): targets free of
noise, and the network begins with its weights (train.init_from)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Losses, SampleSettings, Shapes
from jaxgen.families.flow import MIN_TIME, Flow, noisy
from jaxgen.families.steps import Step
from jaxgen.nn.attention import plain_attention
from jaxgen.nn.module import Params, dtype_of
from jaxgen.text.features import TextFeatures


@register("onestep")
@dataclass(frozen=True)
class OneStep(Flow):
    """A Flow whose network also knows where its step ends (r) and the guidance scale; num_steps of 1 is what it is for."""

    samplers: ClassVar = ("average",)

    teacher: str = ""  # a trained flow (workdir, exported directory or shipped name) to distil; none: learned from pictures
    teacher_flow: Flow | None = None  # its configuration; filled in by resolve()
    guidance: tuple[float, float] = (1.0, 3.0)  # scales trained for; drawing keeps to them
    null_share: float = 0.1  # of captions left out in training, for guidance to lead away from (without a teacher)
    time_uniform: float = 1.0  # what a step learns at t it takes from the steps below it: all of them count alike
    equal_share: float = 0.6  # of steps of no length, r = t: plain flow matching, which the rest hang on
    whole_share: float = 0.1  # of steps to the end, r = 0; for the others r is uniform in [0, t]
    loss_power: float = 0.5  # a picture's loss e counts e / (e + loss_offset)^loss_power; 0 is the squared error
    loss_offset: float = 1e-3

    def validate(self) -> None:
        super().validate()
        if not 1.0 <= self.guidance[0] <= self.guidance[1]:
            raise UserError(f"family.guidance={self.guidance} must be a range of scales, the lower one at least 1")
        if not (0 <= self.null_share < 1 and min(self.equal_share, self.whole_share) >= 0):
            raise UserError("family.null_share, family.equal_share and family.whole_share are shares: give numbers from 0 to 1")
        if self.equal_share + self.whole_share > 1:
            raise UserError(f"family.equal_share + family.whole_share = {self.equal_share + self.whole_share} exceeds 1")
        if not 0 <= self.loss_power <= 1 or self.loss_offset <= 0:
            raise UserError("family.loss_power lies in [0, 1] and family.loss_offset is positive")

    @property
    def _guided(self) -> bool:
        return self.guidance != (1.0, 1.0)

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        image, text = self.clean(frozen, batch, key), batch["text"]
        time_key, noise_key, dropout_key = jax.random.split(key, 3)
        length_key, scale_key, null_key = jax.random.split(jax.random.fold_in(key, 3), 3)
        t = self.draw_times(time_key, image.shape[0])
        s = self.draw_lengths(length_key, image.shape[0])
        scale = jax.random.uniform(scale_key, t.shape, minval=self.guidance[0], maxval=self.guidance[1])
        if self.teacher_flow is None:
            dropped = jax.random.uniform(null_key, t.shape) < self.null_share
            scale = jnp.where(dropped, 1.0, scale)
            text = jax.tree.map(lambda a, b: jnp.where(_wide(dropped, a), b, a), text, _no_text(text))
        x_t, length = noisy(image, t, noise_key), _wide(s, image)
        here, target = jax.lax.stop_gradient(self._velocity_and_target(params, frozen, image, x_t, t, scale, text))

        def predict(x: jax.Array, told: jax.Array) -> jax.Array:
            return self._predict(params, x, told, text, dropout_key)

        # t times the movement along the path: of x_t, and of t, t - r and the guidance.
        moves = x_t - here, jnp.stack([t, t, 0 * t], axis=-1)
        with plain_attention():
            clean, along = jax.jvp(predict, (x_t, times(t, s, scale)), moves)
        right = clean + jax.lax.stop_gradient(length * (along - clean + here))
        error = jnp.mean(jnp.square(right - target), axis=(1, 2, 3))
        weighed = error / jnp.square(jnp.maximum(t, self.loss_min_time))
        loss = weighed * jax.lax.stop_gradient((weighed + self.loss_offset) ** -self.loss_power)
        return {"generator": (jnp.mean(loss), {"clean_mse": jnp.mean(error)})}

    def _velocity_and_target(
        self,
        params: Params,
        frozen: Params,
        image: jax.Array,
        x_t: jax.Array,
        t: jax.Array,
        scale: jax.Array,
        text: TextFeatures,
    ) -> tuple[jax.Array, jax.Array]:
        """Clean pictures that give the guided velocity at x_t, and the loss's target."""
        if self.teacher_flow is not None:
            clean = self._taught(frozen, x_t, t, scale, text, dtype_of(params["generator"]))
            return clean, clean
        own = self._predict(params, x_t, times(t, 0.0 * t, scale), text)
        if not self._guided:
            return own, image
        without = self._predict(params, x_t, times(t, 0.0 * t, jnp.ones_like(t)), _no_text(text))
        return own, image + (1.0 - 1.0 / _wide(scale, image)) * (own - without)

    def _taught(
        self, frozen: Params, x_t: jax.Array, t: jax.Array, scale: jax.Array, text: TextFeatures, dtype: Any
    ) -> jax.Array:
        """The teacher's clean pictures at x_t, guided by `scale` [B]."""
        assert self.teacher_flow is not None
        weights = jax.tree.map(lambda p: p.astype(dtype), frozen["teacher"])
        clean = self.teacher_flow._predict(weights, x_t, t, text)
        if not self._guided:
            return clean
        without = self.teacher_flow._predict(weights, x_t, t, _null_text(frozen["null_text"], text, self.teacher))
        return without + _wide(scale, x_t) * (clean - without)

    def draw_lengths(self, key: jax.Array, count: int) -> jax.Array:
        """float32 [count]: (t - r) / t, of which equal_share are 0 and whole_share 1, the rest uniform between."""
        choice_key, uniform_key = jax.random.split(key)
        choice = jax.random.uniform(choice_key, (count,))
        uniform = jax.random.uniform(uniform_key, (count,))
        whole = choice >= 1.0 - self.whole_share
        return jnp.where(choice < self.equal_share, 0.0, jnp.where(whole, 1.0, uniform))

    def _stepper(self, params: Params, text: TextFeatures, null_text: TextFeatures, settings: SampleSettings) -> Step:
        """Of num_steps steps; one network pass each."""
        scale = jnp.clip(settings.guidance_scale, *self.guidance)

        def step(i: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            t, after = (self._time(j, settings) for j in (i, i + 1))
            s = 1.0 - after / t
            told = times(*(jnp.full(x.shape[:1], a) for a in (t, s, scale)))
            clean = self._predict(params, x, told, text)
            return x + s * (clean - x), clean

        return step

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """The target's passes, then forward with its derivative (of like cost) and backward."""
        of_target = self if self.teacher_flow is None else self.teacher_flow
        return 4.0 * self.flops(shapes, tokens) + (1.0 + self._guided) * of_target.flops(shapes, tokens)

    def resolve(self) -> Self:
        resolved = super().resolve()
        if not self.teacher:
            return resolved
        from jaxgen.model import read_config

        config = read_config(self.teacher)[1]
        if type(config.family) is not Flow:
            raise UserError(f"family.teacher={self.teacher} is no flow: name a run of the family flow")
        if _latents(config.family) != _latents(resolved):
            raise UserError(f"family.teacher={self.teacher} draws in other latents: set family.codec as it has it")
        if config.text.adapted:
            raise UserError(f"family.teacher={self.teacher} was trained with its text encoder: name one that was not")
        return dataclasses.replace(resolved, teacher_flow=config.family)

    def to_draw(self) -> Self:
        return dataclasses.replace(super().to_draw(), teacher_flow=None)

    def init_frozen(self, shapes: Shapes) -> Params:
        frozen = super().init_frozen(shapes)
        if self.teacher_flow is None:
            return frozen
        null = {
            "hidden": jnp.zeros((1, 1, shapes.hidden)),
            "pooled": jnp.zeros((1, shapes.pooled)),
            "mask": jnp.ones((1, 1), bool),
        }
        return frozen | {"teacher": self.teacher_flow.init(jax.random.key(0), shapes), "null_text": null}

    def load_frozen(self) -> Params:
        """The teacher's weights, and the empty caption as its text encoder reads it."""
        frozen = super().load_frozen()
        if self.teacher_flow is None:
            return frozen
        from jaxgen.model import load

        model = load(self.teacher)
        null = jax.device_get(vars(model.encoder("")))
        weights = jax.tree.map(lambda p: np.asarray(p, np.float32), jax.device_get(model.params))
        return frozen | {"teacher": weights, "null_text": null}

    def _predict(
        self, params: Params, x: jax.Array, t: jax.Array, text: TextFeatures, key: jax.Array | None = None
    ) -> jax.Array:
        """x̂, float32 [B, H, W, C], for t [B, 3] as `times` makes it."""
        seen = super()._predict(params, x, t, text, key)
        return x + _wide(jnp.minimum(t[:, 0] / MIN_TIME, 1.0), x) * (seen - x)

    def _build(self, shapes: Shapes):
        plain = super()._build(shapes)

        def build(rngs):
            network: Any = plain(rngs)
            network.conditioning.extend(2, rngs)
            return network

        return build


def times(t: jax.Array, s: jax.Array, scale: jax.Array) -> jax.Array:
    """[B, 3], what the network is told: t, t - r, and 1 - 1 / scale, each in [0, 1]."""
    return jnp.stack([t, s * t, 1.0 - 1.0 / scale], axis=-1)


def _wide(a: jax.Array, like: jax.Array) -> jax.Array:
    """[B] -> [B, 1, ...] with as many axes as `like`."""
    return a.reshape(-1, *[1] * (like.ndim - 1))


def _no_text(text: TextFeatures) -> TextFeatures:
    """What stands for no caption where the text encoder's own is not at hand: a single token, all zero."""
    only = jnp.broadcast_to(jnp.arange(text.mask.shape[1]) == 0, text.mask.shape)
    return TextFeatures(jnp.zeros_like(text.hidden), jnp.zeros_like(text.pooled), only)


def _null_text(null: Params, text: TextFeatures, teacher: str) -> TextFeatures:
    """The empty caption, a row for each of `text`."""
    theirs = null["hidden"].shape[-1], null["pooled"].shape[-1]
    ours = text.hidden.shape[-1], text.pooled.shape[-1]
    if theirs != ours:
        raise UserError(
            f"family.teacher={teacher} reads text features of widths {theirs}, text.source gives {ours}: use its own"
        )
    return TextFeatures(**{name: jnp.broadcast_to(a, (len(text.pooled), *a.shape[1:])) for name, a in null.items()})


def _latents(flow: Flow) -> Any:
    return flow.codec and flow.codec.codec
