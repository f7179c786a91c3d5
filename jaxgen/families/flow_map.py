"""A flow map: from any time t of a flow's path to an earlier time r at once (Boffi et al., arXiv 2406.07507).

Path and velocity v are Flow's. The average velocity u(x_t, r, t) = (integral of v along the path from r to t) / (t - r)
leads from t to r, x_r = x_t - (t - r) u. The network predicts a picture, from which u = (x_t - it) / max(t, 0.05)
(arXiv 2601.22158). Write x̂(x_t, r, t) for x_t - t u, which is that picture but for t < 0.05, where it goes over into x_t, so
that a path of no length leads nowhere. Nothing is divided by a small t, and a step of s = (t - r) / t draws
x_r = (1 - s) x_t + s x̂.

Guidance is built in: the network knows the scale w, and v is the guided velocity. How a map is learned is for those below:
from pictures or from a teacher, which is a trained Flow, whose weights it is best begun with (train.init_from)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.errors import UserError
from jaxgen.families.base import OnePass, SampleSettings, Shapes
from jaxgen.families.flow import MIN_TIME, Flow
from jaxgen.families.steps import Step
from jaxgen.nn.module import Params
from jaxgen.text.features import TextFeatures


@dataclass(frozen=True)
class FlowMap(Flow):
    """A Flow whose network also knows where its step ends (r) and the guidance scale; num_steps of 1 is what it is for."""

    samplers: ClassVar = ("average",)

    teacher: str = ""  # a trained flow (workdir, exported directory or shipped name) to distil; none: learned from pictures
    teacher_flow: Flow | None = None  # its configuration; filled in by resolve()
    guidance: tuple[float, float] = (1.0, 3.0)  # scales trained for; drawing keeps to them

    def validate(self) -> None:
        super().validate()
        if not 1.0 <= self.guidance[0] <= self.guidance[1]:
            raise UserError(f"family.guidance={self.guidance} must be a range of scales, the lower one at least 1")

    @property
    def _guided(self) -> bool:
        return self.guidance != (1.0, 1.0)

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
        return without + wide(scale, x_t) * (clean - without)

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
        return x + wide(jnp.minimum(t[:, 0] / MIN_TIME, 1.0), x) * (seen - x)

    def _build(self, shapes: Shapes):
        plain = super()._build(shapes)

        def build(rngs):
            network: Any = plain(rngs)
            network.conditioning.extend(2, rngs)
            return network

        return build


@dataclass(frozen=True)
class WholeStep(OnePass, FlowMap):
    """A flow map of which only the step from noise to picture is used: one pass, whatever num_steps is."""

    def noise_shape(self, image: tuple[int, int, int]) -> tuple[int, ...]:
        return self._latent(image)

    def from_noise(
        self, params: Params, frozen: Params, text: TextFeatures, settings: SampleSettings, begin: jax.Array
    ) -> jax.Array:
        """See OnePass.from_noise."""
        step = self._stepper(params, text, text, dataclasses.replace(settings, num_steps=1))
        return self._picture(frozen, step(jnp.int32(0), begin)[0])

    def _drawn(self, params: Params, shape: tuple[int, ...], text: TextFeatures, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(float32 [B, h, w, c], scale [B]): what is drawn of noise of this shape, by guidance scales drawn at random too."""
        begin_key, scale_key, dropout_key = jax.random.split(key, 3)
        scale = jax.random.uniform(scale_key, shape[:1], minval=self.guidance[0], maxval=self.guidance[1])
        begin, whole = jax.random.normal(begin_key, shape, jnp.float32), jnp.ones_like(scale)
        return self._predict(params, begin, times(whole, whole, scale), text, dropout_key), scale


def times(t: jax.Array, s: jax.Array, scale: jax.Array) -> jax.Array:
    """[B, 3], what the network is told: t, t - r, and 1 - 1 / scale, each in [0, 1]."""
    return jnp.stack([t, s * t, 1.0 - 1.0 / scale], axis=-1)


def wide(a: jax.Array, like: jax.Array) -> jax.Array:
    """[B] -> [B, 1, ...] with as many axes as `like`."""
    return a.reshape(-1, *[1] * (like.ndim - 1))


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
