import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.dmd import DMD
from jaxgen.families.flow import Flow
from jaxgen.families.flow_map import FlowMap
from jaxgen.families.unet import UNet
from jaxgen.nn.module import flatten
from jaxgen.text.features import TextFeatures
from jaxgen.train.state import create
from jaxgen.train.step import make_step
from tests.families.test_flow import text
from tests.families.test_flow_map import SHAPES, UNET, Known, pictures, random_params

TEACHER = Flow(network=UNET)
STUDENT = DMD(network=UNET, teacher="somewhere", teacher_flow=TEACHER, guidance=(2.0, 2.0))


def null_text():
    return jax.tree.map(np.asarray, vars(text(1, tokens=3, seed=9)))


def known(drawing, seeing, **change):
    """A family whose generator predicts drawing(weights, noise) and whose flows predict seeing(weights, x_t, t, captioned)."""
    teacher = Flow(network=Known(lambda w, x, t, d, g, yes: seeing(w, x, t, yes), 2))
    network = Known(lambda w, x, t, d, g, _: drawing(w, x, t, d, g), 2)
    return dataclasses.replace(STUDENT, network=network, teacher_flow=teacher, **change)


def weights(*numbers):
    return {"weights": jnp.array(numbers)}


def losses_of(family, params, frozen, key, image=None):
    return family.losses(params, frozen, {"image": pictures() if image is None else image, "text": text()}, key)


def test_the_generators_gradient_is_the_way_from_the_score_to_the_guided_teacher():
    """Both flows say one number whatever they see: with a caption their first weight, without one their second."""
    drawing = lambda w, x, t, d, g: w[0] + w[1] * x + t + 2 * d + 4 * g  # noqa: E731
    family = known(drawing, lambda w, x, t, yes: 0 * x + jnp.where(yes, w[0], w[1]), guidance=(2.0, 2.0))
    params = {"generator": weights(0.25, 0.0), "score": weights(0.06, 0.0)}
    frozen = {"teacher": {"generator": weights(0.5, 0.1)}, "null_text": null_text() | {"pooled": np.zeros((1, 10))}}
    loss = lambda own: losses_of(family, params | {"generator": own}, frozen, jax.random.key(0))["generator"][0]  # noqa: E731
    value, grads = jax.value_and_grad(loss)(params["generator"])
    # A whole step from pure noise: t = t - r = 1; guidance by two: 1 - 1 / 2 is said, and 0.1 + 2 (0.5 - 0.1) comes out.
    drawn, theirs, ours = 0.25 + 1 + 2 + 2, 0.9, 0.5 + 5 * 0.06
    pull = (ours - theirs) / (drawn - theirs)
    np.testing.assert_allclose(value, pull**2 / 2, rtol=1e-4)
    np.testing.assert_allclose(grads["weights"][0], pull, rtol=1e-4)  # nothing of it through the flows


def test_the_score_learns_what_is_drawn_as_a_flow_learns_pictures():
    family = known(lambda w, x, t, d, g: 0 * x + w[0], lambda w, x, t, yes: w[0] * x + w[1] * t, score_rate=2.0)
    family = dataclasses.replace(family, teacher_flow=dataclasses.replace(family.teacher_flow, loss_min_time=0.3))
    params = {"generator": weights(0.25, 0.0), "score": weights(0.15, -0.1)}
    frozen = {"teacher": {"generator": weights(0.4, 0.5)}, "null_text": null_text()}
    seen = []
    flow = dataclasses.replace(family.teacher_flow, network=Known(lambda w, x, t, *_: seen.append((x, t)) or 0 * x, 2))
    losses_of(dataclasses.replace(family, teacher_flow=flow), params, frozen, jax.random.key(3))
    x_t, t = (np.asarray(a, np.float64) for a in seen[-1])
    loss = lambda own: losses_of(family, params | {"score": own}, frozen, jax.random.key(3))["score"][0]  # noqa: E731
    value, grads = jax.value_and_grad(loss)(params["score"])
    off = 0.7 * x_t + 0.3 * t - 0.25  # the teacher's weights and what is added to them, twice
    weight = 1 / np.maximum(t, 0.3) ** 2
    assert len(np.unique(t)) == len(t)
    np.testing.assert_allclose(value, np.mean(off**2 * weight), rtol=1e-5)
    expected = [2 * np.mean(2 * off * weight * by) for by in (x_t, t)]
    np.testing.assert_allclose(grads["weights"], expected, rtol=1e-4)
    np.testing.assert_allclose((x_t - (1 - t) * 0.25).std() / t.std(), 1 / t.std() * np.sqrt(np.mean(t**2)), rtol=0.2)


def test_what_is_drawn_comes_to_be_distributed_as_the_teachers_pictures():
    """Pixels are Gaussian, of which both flows know the mean and the logarithm of the spread."""

    def seeing(w, x, t, yes):
        spread = jnp.exp(w[1])
        return w[0] + (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2) * (x - (1 - t) * w[0])

    family = known(lambda w, x, t, d, g: w[0] + w[1] * x, seeing, guidance=(1.0, 1.0), score_rate=4.0)
    shapes, mean, spread = Shapes((4, 4, 1), 12, 10), 0.3, 0.4
    optimizers = {group: optax.adam(optax.linear_schedule(5e-3, 0.0, 1000)) for group in family.groups}
    state = create(family, shapes, optimizers, seed=0)
    state = dataclasses.replace(state, params={"generator": weights(-0.5, 1.0), "score": weights(0.0, 0.0)})
    frozen = {"teacher": {"generator": weights(mean, float(np.log(spread)))}, "null_text": null_text()}
    words = jax.tree.map(jnp.asarray, text(64))
    batch = {"image": jnp.zeros((64, *shapes.image), jnp.uint8), "text": words}
    step = make_step(family, optimizers, seed=0)
    state = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, lambda _, s: step(s, frozen, batch)[0], state))(state)
    mean_of, spread_of = np.asarray(state.params["generator"]["weights"])
    np.testing.assert_allclose((mean_of, abs(spread_of)), (mean, spread), atol=0.05)
    # And the score has followed it there, so that nothing is added to the teacher's weights any more.
    np.testing.assert_allclose(state.params["score"]["weights"], 0.0, atol=0.1)


def test_at_first_the_score_is_the_teacher_and_only_guidance_pulls():
    plain, frozen = (
        dataclasses.replace(STUDENT, guidance=(1.0, 1.0)),
        {"teacher": random_params(TEACHER), "null_text": null_text()},
    )
    for family, apart in ((plain, False), (STUDENT, True)):
        params = family.init(jax.random.key(0), SHAPES)
        own = jax.jit(functools.partial(losses_of, family))(params, frozen, jax.random.key(1))["generator"]
        assert (own[1]["apart"] > 1e-2) == apart
        assert (own[0] > 1e-5) == apart


def test_one_pass_draws_a_flow_maps_picture_whatever_the_number_of_steps():
    family, flow = STUDENT.to_draw(), FlowMap(network=UNET, guidance=(2.0, 2.0))
    params = {"generator": random_params(STUDENT)["generator"]}
    alike = jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, alike)
    assert family.init_frozen(SHAPES) == {}
    settings = SampleSettings(image=SHAPES.image, sampler="direct", num_steps=1, guidance_scale=2.0)
    keys = jax.random.split(jax.random.key(0), 4)
    one = flow.sample(params, {}, text(), text(), keys, settings)
    draw = jax.jit(lambda settings: family.sample(params, {}, text(), text(seed=1), keys, settings))
    for steps in (1, 7):
        seen = np.asarray(draw(dataclasses.replace(settings, num_steps=steps)), int)
        assert np.abs(seen - np.asarray(one)).max() <= 1
    assert len(np.unique(one)) > 50


def test_fresh_weights_are_a_flow_maps_so_that_it_can_begin_with_them():
    flow = FlowMap(network=UNET).init(jax.random.key(0), SHAPES)
    ours = STUDENT.init(jax.random.key(0), SHAPES)
    for (name, a), (other, b) in zip(flatten(ours["generator"]), flatten(flow["generator"]), strict=True):
        assert name == other
        np.testing.assert_array_equal(a, b)
    assert not any(leaf.any() for leaf in jax.tree.leaves(ours["score"]))


def test_train_flops_are_those_xla_counts():
    network = UNet(patch=2, widths=(16,), down=(1,), up=(0,), attention=("joint",), head_dim=8, refiner=1)
    family = dataclasses.replace(STUDENT, network=network, teacher_flow=dataclasses.replace(TEACHER, network=network))
    shapes = Shapes((48, 48, 3), 12, 10)
    params, frozen = family.init(jax.random.key(0), shapes), family.init_frozen(shapes)

    def gradients(params, batch):
        for group in family.groups:
            loss = lambda own, g=group: family.losses(params | {g: own}, frozen, batch, jax.random.key(0))[g][0]  # noqa: E731
            yield jax.grad(loss)(params[group])

    batch = {"image": jnp.ones((1, *shapes.image)), "text": TextFeatures(**vars(text(1)))}
    counted = jax.jit(lambda *args: list(gradients(*args))).lower(params, batch).cost_analysis()["flops"]
    assert 0.6 < family.train_flops(shapes, 6) / counted < 1.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": ""}, "family.teacher: distribution matching distils"),
        ({"renoise": (0.5, 0.2)}, "family.renoise="),
        ({"renoise": (0.0, 0.5)}, "family.renoise="),
        ({"score_rate": 0.0}, "family.score_rate is positive"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(STUDENT, **change).validate()
