"""Distribution matching distillation: one step draws what a trained flow takes for likely at every level of noise.

What one step has drawn is made noisy, x_t = (1 - t) x̂ + t noise, and shown to two flows: the teacher, guided, and the `score`,
which is always learning what is drawn. Their clean pictures differ by the way from what is drawn towards what the teacher would
draw, which is the gradient of the divergence KL(drawn || teacher's) at this noise (Yin et al., arXiv 2311.18828). That asks for
a likely picture, where a squared error between two likely ones asks for the mean of both. No pictures of the teacher's are made
beforehand, and no real ones are looked at (arXiv 2405.14867).

The network is a flow map's, of which only the whole step is used. The score is what is added to
the teacher's weights, nothing at first."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxgen.config import register
from jaxgen.errors import UserError
from jaxgen.families.base import Losses, Shapes
from jaxgen.families.flow import noisy
from jaxgen.families.flow_map import WholeStep
from jaxgen.nn.module import Params, dtype_of
from jaxgen.text.features import TextFeatures


@register("dmd")
@dataclass(frozen=True)
class DMD(WholeStep):
    groups: ClassVar = ("score", "generator")

    renoise: tuple[float, float] = (0.02, 0.98)  # the range of t, uniform, at which the two are compared
    score_rate: float = 5.0  # how many times faster than the generator the score learns, which is to be ahead of it

    def validate(self) -> None:
        super().validate()
        if not self.teacher:
            raise UserError("family.teacher: distribution matching distils a flow; name a run, an exported one or `flow`")
        if not 0 < self.renoise[0] < self.renoise[1] <= 1:
            raise UserError(f"family.renoise={self.renoise} must be a range within 0 to 1")
        if self.score_rate <= 0:
            raise UserError("family.score_rate is positive")

    def init(self, key: jax.Array, shapes: Shapes) -> Params:
        params, teacher = super().init(key, shapes), self.teacher_flow
        if teacher is None:  # as it draws
            return params
        like = jax.eval_shape(lambda: teacher.init(key, shapes)["generator"])
        return params | {"score": jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), like)}

    def logical_axes(self, shapes: Shapes) -> Params:
        assert self.teacher_flow is not None
        return super().logical_axes(shapes) | {"score": self.teacher_flow.logical_axes(shapes)["generator"]}

    def losses(self, params: Params, frozen: Params, batch: dict[str, Any], key: jax.Array) -> Losses:
        """See Family.losses. Both groups are given the same drawn pictures, so that one step need draw them only once."""
        assert self.teacher_flow is not None
        text, shape = batch["text"], self.clean(frozen, batch, key).shape
        draw_key, match_key, score_key = jax.random.split(jax.random.fold_in(key, 5), 3)
        drawn, scale = self._drawn(params, shape, text, draw_key)
        generator = self._match(params, frozen, drawn, scale, text, match_key)
        still = jax.lax.stop_gradient(drawn)
        seen = {"image": still, "latent": still, "text": text}  # in the place of pictures
        score = self.teacher_flow.losses(self._score(params, frozen), frozen, seen, score_key)["generator"]
        return {"score": score, "generator": generator}

    def _match(
        self, params: Params, frozen: Params, drawn: jax.Array, scale: jax.Array, text: TextFeatures, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """A loss whose gradient moves the drawn pictures from where the score has them to where the teacher has them."""
        assert self.teacher_flow is not None
        time_key, noise_key = jax.random.split(key)
        t = jax.random.uniform(time_key, scale.shape, minval=self.renoise[0], maxval=self.renoise[1])
        x_t = noisy(jax.lax.stop_gradient(drawn), t, noise_key)
        theirs = self._taught(frozen, x_t, t, scale, text, dtype_of(params["generator"]))
        ours = self.teacher_flow._predict(self._score(params, frozen), x_t, t, text)
        # Relative to how far the teacher is from the picture, so that all levels of noise count alike.
        away = jnp.mean(jnp.abs(drawn - theirs), axis=(1, 2, 3), keepdims=True)
        pull = (ours - theirs) / jnp.maximum(away, 1e-3)
        goal = jax.lax.stop_gradient(drawn - pull)
        return 0.5 * jnp.mean(jnp.square(drawn - goal)), {"apart": jnp.mean(jnp.abs(ours - theirs))}

    def _score(self, params: Params, frozen: Params) -> Params:
        """The score's weights, a Flow's of the teacher's kind."""
        # Optimizers' steps are of one size whatever the gradient's is, so that a factor here is one of the rate.
        add = lambda a, b: a.astype(b.dtype) + self.score_rate * b  # noqa: E731
        return {"generator": jax.tree.map(add, frozen["teacher"]["generator"], params["score"])}

    def train_flops(self, shapes: Shapes, tokens: int) -> float:
        """Drawing with its backward pass, the teacher, the score compared, and the score learning."""
        assert self.teacher_flow is not None
        return 3.0 * self.flops(shapes, tokens) + (5.0 + self._guided) * self.teacher_flow.flops(shapes, tokens)
