import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.errors import UserError
from jaxgen.families.base import Shapes
from jaxgen.families.flow import MIN_TIME, Flow
from jaxgen.families.onestep import OneStep
from jaxgen.families.unet import UNet
from jaxgen.nn import attention
from jaxgen.nn.module import flatten
from jaxgen.train.state import create
from tests.families.test_flow import text
from tests.families.test_flow_map import NETWORKS, SETTINGS, SHAPES, UNET, Known, at, pictures, random_params

# The squared error of every kind of step, and no time so small that the picture goes over into x_t.
PLAIN = {"loss_power": 0.0, "guidance": (1.0, 1.0), "null_share": 0.0, "time_uniform": 0.0}


def drawn_for(family, key, image):
    """float64 (t, s, scale, x_t) of a loss."""
    time_key, noise_key, _ = jax.random.split(key, 3)
    length_key, scale_key, _ = jax.random.split(jax.random.fold_in(key, 3), 3)
    t, s = family.draw_times(time_key, len(image)), family.draw_lengths(length_key, len(image))
    scale = jax.random.uniform(scale_key, t.shape, minval=family.guidance[0], maxval=family.guidance[1])
    t, s, scale = (np.asarray(a, np.float64)[:, None, None, None] for a in (t, s, scale))
    noise = np.asarray(jax.random.normal(noise_key, image.shape), np.float64)
    return t, s, scale, (1 - t) * np.asarray(image, np.float64) + t * noise


@functools.cache
def learner(family):
    """(loss, gradient) by (params, frozen, image, text, key)."""

    def loss(params, frozen, image, words, key):
        return family.losses(params, frozen, {"image": image, "text": words}, key)["generator"][0]

    return jax.jit(jax.value_and_grad(loss))


# The identity


def test_the_loss_is_that_of_central_differences_along_the_path():
    family = OneStep(network=NETWORKS["transformer"], equal_share=0.0, whole_share=0.5, **PLAIN)
    key, image = jax.random.key(5), pictures()
    params = random_params(family, 0.1)
    t, s, _, x_t = drawn_for(family, key, image)
    predict = jax.jit(family._predict)

    def seen(x, t, length):
        times = np.stack([t.ravel(), length.ravel(), np.zeros(len(t))], axis=-1)
        return np.asarray(predict(params, jnp.asarray(x, jnp.float32), jnp.asarray(times, jnp.float32), text()), np.float64)

    here, clean, h = seen(x_t, t, 0 * t), seen(x_t, t, s * t), 4e-3
    move = lambda h: seen(x_t + h * (x_t - here) / t, t + h, s * t + h)  # noqa: E731
    along = (8 * (move(h) - move(-h)) - (move(2 * h) - move(-2 * h))) / (12 * h)  # of fourth order
    right = clean + s * (t * along - clean + here)
    loss, grads = learner(family)(params, {}, image, text(), key)
    assert np.abs(s * t * along).mean() > 0.05
    np.testing.assert_allclose(loss, np.mean((right - np.asarray(image)) ** 2 / np.maximum(t, 0.2) ** 2), rtol=5e-4)
    # Its gradient is that of x̂ alone.
    pull = jnp.asarray(2 * (right - np.asarray(image)) / np.maximum(t, 0.2) ** 2 / right.size, jnp.float32)
    times = jnp.asarray(np.stack([t.ravel(), (s * t).ravel(), 0 * t.ravel()], axis=-1), jnp.float32)
    expected = jax.jit(jax.grad(lambda p: jnp.sum(pull * family._predict(p, jnp.asarray(x_t, jnp.float32), times, text()))))(
        params
    )
    top = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * top), grads, expected)


def test_loss_and_gradient_of_an_affine_network_are_those_worked_out_in_float64():
    affine = Known(lambda w, x, t, d, g, _: w[0] * x + w[1] * t + w[2] * d + w[3] * g * x + w[4], 5)
    family = OneStep(network=affine, equal_share=0.3, whole_share=0.3, **{**PLAIN, "guidance": (1.5, 1.5)}, teacher_flow=Flow())
    teacher = Known(lambda w, x, t, *rest: jnp.where(rest[-1], 0.5 * x - t, 0.3 * t))
    family = dataclasses.replace(family, teacher_flow=Flow(network=teacher), loss_power=0.7, loss_offset=0.05)
    nothing = {"hidden": jnp.zeros((1, 2, 12)), "pooled": jnp.zeros((1, 10)), "mask": jnp.ones((1, 2), bool)}
    frozen, w, key = {"teacher": at(), "null_text": nothing}, np.array([0.4, -0.3, 0.7, 0.2, 0.1]), jax.random.key(6)
    loss, grads = learner(family)(at(*w), frozen, pictures(), text(), key)
    t, s, _, x = drawn_for(family, key, pictures())
    assert t.min() > MIN_TIME
    g, d = 1 - 1 / 1.5, s * t
    here = 0.3 * t + 1.5 * (0.5 * x - t - 0.3 * t)
    clean = w[0] * x + w[1] * t + w[2] * d + w[3] * g * x + w[4]
    v = (x - here) / t
    along = (w[0] + w[3] * g) * v + w[1] + w[2]
    pull = clean + s * (t * along - clean + here) - here
    error = np.mean(pull**2, axis=(1, 2, 3)) / np.maximum(t.ravel(), 0.2) ** 2
    weight = (error + 0.05) ** -0.7
    np.testing.assert_allclose(loss, np.mean(error * weight), rtol=1e-4)
    slope = 2 * pull * (weight / np.maximum(t.ravel(), 0.2) ** 2)[:, None, None, None] / pull.size
    expected = [np.sum(slope * by) for by in (x, t, d, g * x, 1.0)]
    np.testing.assert_allclose(grads["generator"]["weights"], expected, rtol=1e-3, atol=1e-5)


def gaussian(mean, spread, teacher=False):
    """x̂ where pixels are Gaussian: then x_t - (1 - t) mean only scales, by √((1 - t)² spread² + t²)."""

    def predict(w, x, t, d, g, _):
        width = lambda t: jnp.sqrt((1 - t) ** 2 * spread**2 + t**2)  # noqa: E731
        rest, r = x - (1 - t) * mean, t - d
        x_r = (1 - r) * mean + width(r) / width(t) * rest
        now = mean + (1 - t) * spread**2 / width(t) ** 2 * rest
        far = x - t * (x - x_r) / jnp.where(d > 1e-3, d, 1.0)
        clean = jnp.where(d > 1e-3, far, now)
        if teacher:
            return now
        bent = clean + w[0] + w[1] * x + w[2] * d
        return x + (bent - x) / jnp.minimum(t / MIN_TIME, 1.0)

    return Known(predict, 3)


def point(mean):
    """x̂ where there is but one picture."""
    return Known(lambda w, x, t, d, g, _: x + (mean + w[0] + w[1] * x + w[2] * d - x) / jnp.minimum(t / MIN_TIME, 1.0), 3)


EXACT = OneStep(network=gaussian(0.2, 0.5), equal_share=0.2, whole_share=0.2, **PLAIN)


def test_the_exact_average_velocity_has_no_loss_with_an_exact_teacher():
    family = dataclasses.replace(EXACT, teacher_flow=Flow(network=gaussian(0.2, 0.5, teacher=True)), time_uniform=0.5)
    frozen = {"teacher": at(0.0, 0.0, 0.0)}
    for seed in range(4):
        loss, _ = learner(family)(at(0.0, 0.0, 0.0), frozen, pictures(32), text(32), jax.random.key(seed))
        assert loss < 1e-5
        assert learner(family)(at(0.05, 0.0, 0.0), frozen, pictures(32), text(32), jax.random.key(seed))[0] > 1e-3


def test_learning_from_pictures_has_its_rest_at_the_exact_average_velocity():
    rows, keys = 256, jax.random.split(jax.random.key(7), 64)
    image = 0.2 + 0.5 * jax.random.normal(jax.random.key(8), (64, rows, 2, 2, 1))
    words = text(rows)

    @jax.jit
    def slopes(weights):
        def one(image, key):
            loss = lambda p: EXACT.losses(p, {}, {"image": image, "text": words}, key)["generator"][0]  # noqa: E731
            return jax.grad(loss)(weights)["generator"]["weights"]

        grads = jax.lax.map(lambda row: one(*row), (image, keys))
        return grads.mean(0) / (grads.std(0) / 8)  # in standard errors

    assert np.abs(slopes(at(0.0, 0.0, 0.0))).max() < 4
    for weights in ((0.05, 0.0, 0.0), (0.0, 0.05, 0.0), (0.0, 0.0, 0.1)):
        assert np.abs(slopes(at(*weights))).max() > 8


def test_one_picture_alone_has_no_loss_and_is_drawn_in_any_number_of_steps():
    clean = jnp.linspace(-1, 1, 8 * 8 * 3).reshape(SHAPES.image)
    family = dataclasses.replace(EXACT, network=point(clean), time_uniform=0.3)
    image = jnp.broadcast_to(clean, (16, *SHAPES.image))
    assert learner(family)(at(0.0, 0.0, 0.0), {}, image, text(16), jax.random.key(0))[0] < 1e-9
    assert learner(family)(at(0.05, 0.0, 0.0), {}, image, text(16), jax.random.key(0))[0] > 1e-3
    expected = np.round((np.asarray(clean) + 1) * 127.5)
    for steps in (1, 3, 40):
        settings = dataclasses.replace(SETTINGS, num_steps=steps)
        drawn = family.sample(at(0.0, 0.0, 0.0), {}, text(2), text(2), jax.random.split(jax.random.key(0), 2), settings)
        assert np.abs(np.asarray(drawn) - expected).max() <= 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_average_velocity_draws_what_the_flow_leads_to(steps, shift):
    family, keys = dataclasses.replace(EXACT, sample_shift=shift), jax.random.split(jax.random.key(4), 4)
    noise = np.asarray(jax.vmap(lambda k: jax.random.normal(k, SHAPES.image))(keys))
    settings = dataclasses.replace(SETTINGS, num_steps=steps)
    drawn = family.sample(at(0.0, 0.0, 0.0), {}, text(), text(), keys, settings)
    np.testing.assert_allclose(np.asarray(drawn) / 127.5 - 1, np.clip(0.2 + 0.5 * noise, -1, 1), atol=1 / 127)


# Flow matching as its border


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_steps_of_no_length_have_the_loss_of_flow_matching(dropout):
    network = dataclasses.replace(UNET, dropout=dropout)
    family = OneStep(network=network, equal_share=1.0, whole_share=0.0, **PLAIN)
    params = random_params(family)
    # The flow's network does not know r; a frozen time is left out of both, whose features differ.
    params["generator"]["conditioning"]["time"]["first"]["kernel"] *= 0.0
    params["generator"]["conditioning"]["more"]["first"]["kernel"] *= 0.0
    params["generator"]["conditioning"]["more"]["second"]["kernel"] *= 0.0
    params["generator"]["conditioning"]["more"]["second"]["bias"] *= 0.0
    batch, key = {"image": pictures(), "text": text()}, jax.random.key(3)
    flow = Flow(network=network, time_uniform=0.0)
    expected, metrics = jax.jit(flow.losses)(params, {}, batch, key)["generator"]
    loss, metrics2 = jax.jit(family.losses)(params, {}, batch, key)["generator"]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics2["clean_mse"], metrics["clean_mse"], rtol=1e-5)


def test_lengths_have_the_stated_shares():
    lengths = np.asarray(OneStep(equal_share=0.5, whole_share=0.2).draw_lengths(jax.random.key(0), 20_000))
    assert abs(np.mean(lengths == 0) - 0.5) < 0.02
    assert abs(np.mean(lengths == 1) - 0.2) < 0.02
    between = lengths[(lengths > 0) & (lengths < 1)]
    np.testing.assert_allclose(np.quantile(between, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


# Guidance


def captioned(clean, without, power=1.0):
    """A network that predicts clean · scale^power with a caption."""
    return Known(lambda w, x, t, d, g, yes: 0 * x + jnp.where(yes, clean / (1 - g) ** power, without))


def test_guidance_learned_from_pictures_rests_at_guidance_by_its_scale():
    # Without a caption 0, with it 0.25: guided by w that is 0.25 w.
    family = OneStep(network=captioned(0.25, 0.0), guidance=(1.0, 3.0), null_share=0.0, equal_share=1.0, whole_share=0.0)
    family = dataclasses.replace(family, loss_power=0.0, time_uniform=0.0)
    image = jnp.full((32, *SHAPES.image), 0.25)
    assert learner(family)(at(), {}, image, text(32), jax.random.key(0))[0] < 1e-9
    other = dataclasses.replace(family, network=captioned(0.25, 0.0, power=0.5))
    assert learner(other)(at(), {}, image, text(32), jax.random.key(0))[0] > 1e-2


def test_a_share_of_captions_is_left_out_and_not_guided():
    said = []
    network = Known(lambda w, x, t, d, g, yes: said.append((yes, g)) or 0 * x)
    family = OneStep(network=network, null_share=0.3, guidance=(1.5, 3.0))
    family.losses(at(), {}, {"image": pictures(2000), "text": text(2000)}, jax.random.key(0))
    (yes, guidance), (none, of_none) = (tuple(np.asarray(a).ravel() for a in pair) for pair in said[:2])
    assert abs(np.mean(~yes) - 0.3) < 0.03
    assert (guidance[~yes] == 0).all()
    assert guidance[yes].min() > 1 - 1 / 1.5 - 1e-6
    np.testing.assert_allclose(guidance[yes].max(), 1 - 1 / 3, atol=1e-3)
    np.testing.assert_allclose(np.mean(1 / (1 - guidance[yes])), 2.25, atol=0.05)  # scales are uniform
    assert not none.any()  # what guidance leads away from
    assert (of_none == 0).all()


# A teacher

TEACHER = Flow(network=UNET)
STUDENT = OneStep(network=UNET, teacher="somewhere", teacher_flow=TEACHER, guidance=(2.0, 2.0))


@functools.cache
def frozen():
    null = jax.tree.map(np.asarray, vars(text(1, tokens=3, seed=9)))
    return {"teacher": random_params(TEACHER), "null_text": null}


def test_the_teachers_guided_velocity_takes_the_pictures_place():
    """With steps of no length that is the squared error between the two networks' clean pictures."""
    family = dataclasses.replace(STUDENT, equal_share=1.0, whole_share=0.0, loss_power=0.0, time_uniform=0.0)
    params, key = random_params(family, 0.3), jax.random.key(5)
    loss, _ = learner(family)(params, frozen(), pictures(), text(), key)
    t, _, _, x_t = drawn_for(family, key, pictures())
    x, at_t = jnp.asarray(x_t, jnp.float32), jnp.asarray(t.ravel(), jnp.float32)
    predict = jax.jit(TEACHER._predict)
    null = jax.tree.map(lambda a: jnp.repeat(a, 4, axis=0), text(1, tokens=3, seed=9))
    with_text, without = predict(frozen()["teacher"], x, at_t, text()), predict(frozen()["teacher"], x, at_t, null)
    own = jax.jit(family._predict)(params, x, jnp.stack([at_t, 0 * at_t, 0 * at_t + 0.5], axis=1), text())
    target = np.asarray(without + 2.0 * (with_text - without), np.float64)
    assert np.abs(with_text - without).mean() > 0.02
    np.testing.assert_allclose(loss, np.mean((np.asarray(own) - target) ** 2 / np.maximum(t, 0.2) ** 2), rtol=1e-4)


def test_a_teacher_is_neither_trained_nor_kept_nor_drawn_with():
    loss = lambda frozen, params: learner(STUDENT)(params, frozen, pictures(), text(), jax.random.key(0))[0]  # noqa: E731
    grads = jax.jit(jax.grad(loss, allow_int=True))(frozen(), random_params(STUDENT))
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads["teacher"]))
    state = create(STUDENT, SHAPES, {"generator": optax.sgd(0.1)}, seed=0)
    alone = dict(flatten(jax.eval_shape(lambda: OneStep(network=UNET).init(jax.random.key(0), SHAPES))))
    assert dict(flatten(state.params)).keys() == dict(flatten(state.ema_params)).keys() == alone.keys()
    shapes = jax.tree.map(lambda a: a.shape, jax.eval_shape(lambda: STUDENT.init_frozen(SHAPES))["teacher"])
    assert shapes == jax.tree.map(lambda a: a.shape, frozen()["teacher"])
    assert STUDENT.to_draw().init_frozen(SHAPES) == STUDENT.to_draw().load_frozen() == {}
    assert STUDENT.to_draw().teacher == "somewhere"


# The house


def test_the_derivative_is_of_plain_attention(monkeypatch):
    """An accelerator's kernels need not have one in forward mode."""
    calls = []
    plain = lambda q, k, v, *rest, **options: calls.append(1) or v[:, : q.shape[1]]  # noqa: E731
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", plain)
    family = OneStep(network=NETWORKS["transformer"], guidance=(1.0, 1.0))
    params = family.init(jax.random.key(0), SHAPES)
    jax.eval_shape(lambda: family.losses(params, {}, {"image": pictures(), "text": text()}, jax.random.key(0)))
    assert len(calls) == 1  # of the one block, for the velocity; none for the derivative
    with attention.plain_attention():
        pass
    jax.eval_shape(lambda: family._predict(params, pictures(), jnp.ones((4, 3)), text()))
    assert len(calls) == 2


@pytest.mark.parametrize("teacher_flow", [None, TEACHER], ids=["pictures", "teacher"])
def test_train_flops_are_those_xla_counts(teacher_flow):
    network = UNet(patch=2, widths=(16,), down=(1,), up=(0,), attention=("joint",), head_dim=8, refiner=1)
    teacher = teacher_flow and dataclasses.replace(teacher_flow, network=network)
    family, shapes = OneStep(network=network, teacher_flow=teacher), Shapes((48, 48, 3), 12, 10)
    params, given = family.init(jax.random.key(0), shapes), family.init_frozen(shapes)
    cost = learner(family).lower(params, given, jnp.ones((1, *shapes.image)), text(1), jax.random.key(0)).cost_analysis()
    # XLA also counts element-wise work, and the products of attention, which are derived by both sides.
    assert 0.6 < family.train_flops(shapes, 6) / cost["flops"] < 1.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"equal_share": 0.8, "whole_share": 0.3}, "exceeds 1"),
        ({"null_share": 1.0}, "are shares"),
        ({"loss_power": 1.5}, "family.loss_power"),
        ({"loss_offset": 0.0}, "family.loss_offset"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    with pytest.raises(UserError, match=message):
        OneStep(**change).validate()
