import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.families.adversarial import Adversarial
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.flow_map import FlowMap
from jaxgen.families.gan import Gan
from jaxgen.families.gan_networks import DCGAN, Residual
from jaxgen.families.unet import UNet
from tests.families.test_flow import text
from tests.families.test_flow_map import SHAPES, UNET, Known, at, pictures, random_params

SETTINGS = SampleSettings(image=SHAPES.image, sampler="direct")
KEYS = jax.random.split(jax.random.key(3), 4)


class Witness(Gan):
    """Its losses are means of what it is shown: of the real pictures the one, of the drawn ones the other."""

    def contest(self, params, image, drawn, text, keys):
        return {"discriminator": (jnp.mean(image), {}), "generator": (jnp.mean(drawn), {"spread": jnp.std(drawn)})}


def test_the_judge_sees_what_a_whole_step_makes_of_pure_noise():
    network = Known(lambda w, x, t, d, g, _: w[0] * x + w[1] + t + 2 * d + 4 * g, 2)
    family = Adversarial(network=network, judge=Witness(), guidance=(2.0, 2.0))

    def losses(weights):
        params = {"generator": {"weights": weights}, "discriminator": {}}
        return family.losses(params, {}, {"image": pictures(), "text": text()}, jax.random.key(0))

    weights = jnp.array([0.5, 0.25])
    found = losses(weights)
    np.testing.assert_allclose(found["discriminator"][0], np.mean(pictures()), rtol=1e-5)
    np.testing.assert_allclose(found["generator"][1]["spread"], 0.5, rtol=0.1)  # of noise alone, none of the picture
    pull = jax.grad(lambda w: losses(w)["generator"][0])(weights)
    # t = t - r = 1, and of guidance by two 1 - 1 / 2.
    np.testing.assert_allclose(found["generator"][0] - 0.5 * pull[0], 0.25 + 1 + 2 + 2, rtol=1e-5)
    np.testing.assert_allclose(pull[1], 1.0, rtol=1e-5)


def test_the_judge_and_the_generator_meet_in_the_gans_own_contest():
    judge = Gan(network=DCGAN(width=4, text=4), r1=0.3, r2=0.2, penalty_every=2)
    family = Adversarial(network=Known(lambda w, x, *_: w[0] * x), judge=judge)
    params = family.init(jax.random.key(1), SHAPES) | at(0.5)
    batch, key = {"image": pictures(), "text": text()}, jax.random.key(0)
    draw_key, *keys = jax.random.split(key, 3)
    drawn = 0.5 * jax.random.normal(jax.random.split(draw_key, 3)[0], batch["image"].shape)
    theirs = judge.contest(params["discriminator"], batch["image"], drawn, batch["text"], keys)
    ours = family.losses(params, {}, batch, key)
    assert list(ours) == list(family.groups)
    for group in ours:
        np.testing.assert_allclose(ours[group][0], theirs[group][0], rtol=1e-6)
    # Each group is moved by its own loss: the discriminator's leaves the generator as it is.
    moved = jax.grad(lambda own: family.losses(params | {"generator": own}, {}, batch, key)["discriminator"][0])
    np.testing.assert_array_equal(moved(params["generator"])["weights"], 0.0)
    pulled = jax.grad(lambda own: family.losses(params | {"generator": own}, {}, batch, key)["generator"][0])
    assert abs(pulled(params["generator"])["weights"][0]) > 1e-5


def test_one_pass_is_a_flow_maps_single_step_whatever_the_number_of_steps():
    family, flow_map = Adversarial(network=UNET, guidance=(2.0, 2.0)), FlowMap(network=UNET, guidance=(2.0, 2.0))
    params = random_params(flow_map)
    average = dataclasses.replace(SETTINGS, sampler="average", num_steps=1)
    theirs = np.asarray(flow_map.sample(params, {}, text(), text(), KEYS, average), int)
    draw = jax.jit(lambda settings: family.sample(params, {}, text(), text(seed=1), KEYS, settings))
    for steps in (1, 7):
        ours = np.asarray(draw(dataclasses.replace(SETTINGS, num_steps=steps, guidance_scale=4.0)), int)
        assert np.abs(ours - theirs).max() <= 1
    assert len(np.unique(theirs)) > 50
    frames = np.asarray(family.trace(params, {}, text(), text(), KEYS, SETTINGS, frames=3), int)
    assert np.abs(frames[-1] - theirs).max() <= 1
    assert np.abs(frames[0] - theirs).max() > 5


def test_temperature_scales_the_noise():
    family, captions = Adversarial(network=Known(lambda w, x, *_: 0.5 * x)), text()
    cold, warm = (
        np.asarray(family.sample(at(), {}, captions, captions, KEYS, dataclasses.replace(SETTINGS, temperature=heat)), float)
        for heat in (0.2, 0.4)
    )
    np.testing.assert_allclose((warm - 127.5) / 2, cold - 127.5, atol=1.0)


def test_it_begins_as_a_flow_map_and_is_drawn_with_without_its_judge():
    family = Adversarial(network=UNET, judge=Gan(network=DCGAN(width=4, text=4)))
    params, axes = family.init(jax.random.key(0), SHAPES), family.logical_axes(SHAPES)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda a: isinstance(a, tuple))
    flow_map = FlowMap(network=UNET).init(jax.random.key(0), SHAPES)
    jax.tree.map(np.testing.assert_array_equal, params["generator"], flow_map["generator"])
    assert family.to_draw() == Adversarial(network=UNET, judge=Gan())
    # The judge's own generator is not made.
    assert not {"discriminator", "generator"} & params["discriminator"].keys()
    like = family.judge.init(jax.random.key(0), SHAPES)["discriminator"]
    assert jax.tree.map(jnp.shape, params["discriminator"]) == jax.tree.map(jnp.shape, like)


def test_train_flops_are_those_xla_counts():
    judge = Gan(
        network=Residual(widths=(32,), blocks=(1,), attention=("text",), seen_widths=(32,), seen_blocks=(1,), judge_width=32),
        penalty_every=1,
    )
    network = UNet(patch=2, widths=(16,), down=(1,), up=(0,), attention=("joint",), head_dim=8, refiner=1)
    family, shapes = Adversarial(network=network, judge=judge), Shapes((32, 32, 3), 12, 10)
    params = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))
    batch = {"image": jnp.ones((2, *shapes.image)), "text": text(2)}

    def gradients(params, batch):
        for group in family.groups:
            loss = lambda own, g=group: family.losses(params | {g: own}, {}, batch, jax.random.key(0))[g][0]  # noqa: E731
            yield jax.grad(loss)(params[group])

    counted = jax.jit(lambda *args: list(gradients(*args))).lower(params, batch).cost_analysis()["flops"]
    assert 0.6 < 2 * family.train_flops(shapes, 6) / counted < 1.05


def test_a_teacher_is_refused():
    with pytest.raises(UserError, match=r"family.teacher=flow: this one learns from pictures; name it in train.init_from"):
        Adversarial(teacher="flow").validate()


def test_pictures_that_do_not_fit_the_judge_are_told():
    family = Adversarial(network=UNET, judge=Gan(network=DCGAN(width=4, text=4)))
    with pytest.raises(UserError, match=r"image_size=12"):
        family.init(jax.random.key(0), Shapes((12, 12, 3), 12, 10))
