import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.flow import Flow
from jaxgen.families.flow_map import FlowMap
from jaxgen.families.onestep import OneStep
from jaxgen.families.transformer import Transformer
from jaxgen.families.unet import UNet
from jaxgen.model import read_config
from jaxgen.nn.module import flatten
from jaxgen.text.features import TextFeatures
from jaxgen.train.config import RunConfig
from tests.families.test_flow import text

SHAPES = Shapes((8, 8, 3), 12, 10)
UNET = UNet(patch=2, widths=(8,), down=(1,), up=(0,), attention=("none",), head_dim=8, refiner=0)
NETWORKS = {"unet": UNET, "transformer": Transformer(patch=4, width=16, depth=1, head_dim=8, refiner=0)}
SETTINGS = SampleSettings(image=SHAPES.image, sampler="average", num_steps=1, guidance_scale=1.0)


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


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_begins_as_the_flow_it_takes_its_weights_from(name):
    """But for the fast frequencies of time, which it leaves out."""
    family, flow = FlowMap(network=NETWORKS[name]), Flow(network=NETWORKS[name])
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
    family = FlowMap(network=UNET)
    x, times = pictures(), jnp.array([[0.0, 0.0, 0.0], [0.01, 0.01, 0.3], [0.05, 0.02, 0.0], [0.2, 0.1, 0.0]])
    params = random_params(family)
    seen = jax.jit(family._predict)(params, x, times, text())
    plain = jax.jit(super(FlowMap, family)._predict)(params, x, times, text())
    share = np.array([0.0, 0.2, 1.0, 1.0])[:, None, None, None]
    np.testing.assert_allclose(seen, (1 - share) * x + share * plain, atol=1e-6)


def test_guidance_is_chosen_when_drawing_without_a_second_pass():
    passes = []
    network = Known(lambda w, x, t, d, g, yes: passes.append(len(x)) or 0 * x + 0.21 / (1 - g))
    family, keys = FlowMap(network=network, guidance=(1.0, 3.0)), jax.random.split(jax.random.key(0), 2)
    draw = jax.jit(lambda null, settings: family.sample(at(), {}, text(2), null, keys, settings))
    for scale, value in ((1.0, 0.21), (2.0, 0.42), (3.0, 0.63), (9.0, 0.63), (0.0, 0.21)):
        for null in (text(2), text(2, seed=1)):
            drawn = np.asarray(draw(null, dataclasses.replace(SETTINGS, num_steps=3, guidance_scale=scale)))
            np.testing.assert_array_equal(drawn, round((value + 1) * 127.5))
    assert passes == [2]  # traced once, two rows for two pictures


def test_the_shipped_flow_can_be_the_teacher():
    family = FlowMap(teacher="flow").resolve()
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
    student = OneStep(network=UNET, teacher="somewhere", teacher_flow=Flow(network=UNET))
    with pytest.raises(UserError, match=r"family.teacher=.* is no flow"):
        FlowMap(teacher=write_run(tmp_path / "student", family=student)).resolve()
    read = read_config(str(tmp_path / "student"))[1].family  # as it is drawn with and exported
    assert read == student.to_draw()
    with pytest.raises(UserError, match="no such directory or shipped model"):
        FlowMap(teacher="nowhere").resolve()


def test_a_teacher_reads_text_features_of_its_own_widths():
    network = Known(lambda w, x, *_: x)
    family = FlowMap(network=network, teacher="somewhere", teacher_flow=Flow(network=network))
    null = jax.tree.map(np.asarray, vars(text(1, tokens=3)))
    words = TextFeatures(jnp.zeros((4, 6, 13)), jnp.zeros((4, 10)), jnp.ones((4, 6), bool))
    with pytest.raises(UserError, match=r"family.teacher=somewhere reads text features of widths \(12, 10\), .* \(13, 10\)"):
        family._taught({"teacher": at(), "null_text": null}, pictures(), jnp.ones(4), jnp.ones(4), words, jnp.float32)


@pytest.mark.parametrize("guidance", [(0.5, 2.0), (3.0, 2.0)])
def test_guidance_is_a_range_of_scales(guidance):
    with pytest.raises(UserError, match=r"family.guidance="):
        FlowMap(guidance=guidance).validate()
