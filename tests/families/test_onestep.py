import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.flow import MIN_TIME, Flow
from jaxgen.families.onestep import OneStep
from jaxgen.families.transformer import Transformer
from jaxgen.families.unet import UNet
from jaxgen.model import read_config
from jaxgen.nn import attention
from jaxgen.nn.module import flatten
from jaxgen.text.features import TextFeatures
from jaxgen.train.config import RunConfig
from jaxgen.train.state import create
from tests.families.test_flow import text

SHAPES = Shapes((8, 8, 3), 12, 10)
UNET = UNet(patch=2, widths=(8,), down=(1,), up=(0,), attention=("none",), head_dim=8, refiner=0)
NETWORKS = {"unet": UNET, "transformer": Transformer(patch=4, width=16, depth=1, head_dim=8, refiner=0)}
SETTINGS = SampleSettings(image=SHAPES.image, sampler="average", num_steps=1, guidance_scale=1.0)
# The squared error of every kind of step, and no time so small that the picture goes over into x_t.
PLAIN = {"loss_power": 0.0, "guidance": (1.0, 1.0), "null_share": 0.0, "time_uniform": 0.0}


class Known:
    """A network of few weights: predict(weights, x, t, t - r, guidance, whether there is a caption), all as wide as x."""

    def __init__(self, predict, count=1):
        self.predict, self.count = predict, count

    def check_image(self, image):
        pass

    def build(self, rngs, shapes, out):
        known = self

        class Conditioning(nnx.Module):
            def extend(self, count, rngs):
                assert count == 2

        class Network(nnx.Module):
            def __init__(self):
                self.weights = nnx.Param(jnp.zeros(known.count), axes=(None,))
                self.conditioning = Conditioning()

            def __call__(self, x, t, text, key=None):
                t = t[:, None] if t.ndim == 1 else t
                numbers = [t[:, i, None, None, None] for i in range(t.shape[1])] + [0.0, 0.0][: 3 - t.shape[1]]
                captioned = jnp.any(text.pooled != 0, axis=1)[:, None, None, None]
                return known.predict(self.weights[...], x, *numbers, captioned)

        return Network()

    def flops(self, shapes, tokens):
        return 1.0


def at(*weights):
    return {"generator": {"weights": jnp.array(weights or (0.0,))}}


def random_params(family, scale=0.2):
    """Every weight random, also those that start at zero; a tree of the caller's own."""
    return jax.tree.map(lambda leaf: leaf, _random_params(family, scale))


@functools.cache
def _random_params(family, scale):
    leaves, tree = jax.tree.flatten(family.init(jax.random.key(0), SHAPES))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


def pictures(rows=4):
    return jax.random.uniform(jax.random.key(2), (rows, *SHAPES.image), minval=-1, maxval=1)


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


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_begins_as_the_flow_it_takes_its_weights_from(name):
    """But for the fast frequencies of time, which it leaves out."""
    family, flow = OneStep(network=NETWORKS[name]), Flow(network=NETWORKS[name])
    theirs = random_params(flow)
    ours = family.init(jax.random.key(0), SHAPES)
    new = dict(flatten(ours)).keys() - dict(flatten(theirs)).keys()
    assert {name.split(".")[2] for name in new} == {"more"}
    ours["generator"] = {**ours["generator"], **theirs["generator"]}
    ours["generator"]["conditioning"] = {
        **theirs["generator"]["conditioning"],
        "more": family.init(jax.random.key(0), SHAPES)["generator"]["conditioning"]["more"],
    }
    kernel = theirs["generator"]["conditioning"]["time"]["first"]["kernel"].reshape(2, 64, -1)
    frequencies = np.exp(np.linspace(0, np.log(1000), 64))
    slow = np.where(frequencies[:, None] < 8.1, kernel, 0.0)
    theirs["generator"]["conditioning"]["time"]["first"] |= {"kernel": jnp.asarray(slow.reshape(128, -1))}
    x, t = pictures(), jnp.array([0.1, 0.4, 0.7, 1.0])
    expected = jax.jit(flow._predict)(theirs, x, t, text())
    for rest in (jnp.zeros((4, 2)), jnp.full((4, 2), 0.3)):
        seen = jax.jit(family._predict)(ours, x, jnp.concatenate([t[:, None], rest], axis=1), text())
        np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)


def test_a_path_of_no_length_leads_nowhere():
    family = OneStep(network=UNET)
    x, times = pictures(), jnp.array([[0.0, 0.0, 0.0], [0.01, 0.01, 0.3], [0.05, 0.02, 0.0], [0.2, 0.1, 0.0]])
    params = random_params(family)
    seen = jax.jit(family._predict)(params, x, times, text())
    plain = jax.jit(super(OneStep, family)._predict)(params, x, times, text())
    share = np.array([0.0, 0.2, 1.0, 1.0])[:, None, None, None]
    np.testing.assert_allclose(seen, (1 - share) * x + share * plain, atol=1e-6)


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


def test_guidance_is_chosen_when_drawing_without_a_second_pass():
    passes = []
    network = Known(lambda w, x, t, d, g, yes: passes.append(len(x)) or 0 * x + 0.21 / (1 - g))
    family, keys = OneStep(network=network, guidance=(1.0, 3.0)), jax.random.split(jax.random.key(0), 2)
    draw = jax.jit(lambda null, settings: family.sample(at(), {}, text(2), null, keys, settings))
    for scale, value in ((1.0, 0.21), (2.0, 0.42), (3.0, 0.63), (9.0, 0.63), (0.0, 0.21)):
        for null in (text(2), text(2, seed=1)):
            drawn = np.asarray(draw(null, dataclasses.replace(SETTINGS, num_steps=3, guidance_scale=scale)))
            np.testing.assert_array_equal(drawn, round((value + 1) * 127.5))
    assert passes == [2]  # traced once, two rows for two pictures


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


def test_the_shipped_flow_can_be_the_teacher():
    family = OneStep(teacher="flow").resolve()
    assert family.teacher_flow == read_config("flow")[1].family
    given = family.load_frozen()
    shapes = jax.eval_shape(lambda: family.init_frozen(Shapes((32, 32, 3), 384, 384)))
    assert jax.tree.map(lambda a: a.shape, given["teacher"]) == jax.tree.map(lambda a: a.shape, shapes["teacher"])
    assert {leaf.dtype for leaf in jax.tree.leaves(given["teacher"])} == {np.dtype("float32")}
    null = TextFeatures(**given["null_text"])
    assert null.hidden.shape == (1, null.mask.shape[1], 384)
    assert null.mask.sum() == 2  # [CLS] and [SEP]
    np.testing.assert_allclose(np.linalg.norm(null.pooled), 1.0, rtol=1e-5)


def write_run(directory, **change):
    directory.mkdir()
    values = configs.to_dict(RunConfig(**change))
    (directory / "config.json").write_text(json.dumps(values))
    return str(directory)


def test_what_a_run_names_as_its_teacher_must_be_one(tmp_path):
    with pytest.raises(UserError, match=r"family.teacher=.* is no flow"):
        OneStep(teacher=write_run(tmp_path / "student", family=STUDENT)).resolve()
    read = read_config(str(tmp_path / "student"))[1].family  # as it is drawn with and exported
    assert read == STUDENT.to_draw()
    with pytest.raises(UserError, match="no such directory or shipped model"):
        OneStep(teacher="nowhere").resolve()
    words = TextFeatures(jnp.zeros((4, 6, 13)), jnp.zeros((4, 10)), jnp.ones((4, 6), bool))
    family = dataclasses.replace(
        STUDENT, network=gaussian(0.0, 1.0), teacher_flow=Flow(network=gaussian(0.0, 1.0, teacher=True))
    )
    with pytest.raises(UserError, match=r"family.teacher=somewhere reads text features of widths \(12, 10\), .* \(13, 10\)"):
        family.losses(
            at(0.0, 0.0, 0.0),
            {**frozen(), "teacher": at(0.0, 0.0, 0.0)},
            {"image": pictures(), "text": words},
            jax.random.key(0),
        )


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
        ({"guidance": (0.5, 2.0)}, "family.guidance="),
        ({"guidance": (3.0, 2.0)}, "family.guidance="),
        ({"equal_share": 0.8, "whole_share": 0.3}, "exceeds 1"),
        ({"null_share": 1.0}, "are shares"),
        ({"loss_power": 1.5}, "family.loss_power"),
        ({"loss_offset": 0.0}, "family.loss_offset"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    with pytest.raises(UserError, match=message):
        OneStep(**change).validate()
