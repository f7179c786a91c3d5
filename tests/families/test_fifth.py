"""What docs/families.md shows how to add is a family that learns and draws (that its blocks run is test_readme's business)."""

import dataclasses
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.gan_networks import DCGAN
from jaxgen.text.features import TextFeatures
from jaxgen.train.config import OptimizerConfig, RunConfig
from jaxgen.train.optimizers import make_optimizer
from jaxgen.train.state import create
from jaxgen.train.step import make_step
from tests.test_readme import blocks

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
SHAPES = Shapes((8, 8, 3), 6, 6)
ROWS, STEPS = 8, 150


@pytest.fixture(scope="module")
def family():
    (example,) = (code for language, code in blocks(PAGE.read_text()) if language == "python" and "(OnePass)" in code)
    assert len(example.splitlines()) <= 80
    module = types.ModuleType("jaxgen.families.imle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        patch.setattr(configs, "_TYPES", dict(configs._TYPES))
        exec(example, module.__dict__)
        yield module.IMLE(network=DCGAN(noise=4, width=8, text=4))


def text(rows):
    """Two captions, by turns."""
    pooled = jnp.asarray(np.eye(2, 6)[np.arange(rows) % 2] * 3.0, jnp.float32)
    return TextFeatures(pooled[:, None], pooled, jnp.ones((rows, 1), bool))


def pictures(rows):
    """uint8 [rows, 8, 8, 3]: the first caption's are dark, the second's bright; half of either end otherwise on the left."""
    made = np.where(np.arange(rows) % 2, 200, 40)[:, None, None, None] * np.ones((1, 8, 8, 3))
    made[np.arange(rows) % 4 > 1, :, :2] = 240 - made[np.arange(rows) % 4 > 1, :, :2]
    return made.astype(np.uint8)


@pytest.fixture(scope="module")
def learned(family):
    optimizers = {"generator": make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=1), STEPS)}
    state = create(family, SHAPES, optimizers, seed=0)
    step = jax.jit(make_step(family, optimizers, seed=0), donate_argnums=0)
    batch, losses = {"image": jnp.asarray(pictures(ROWS)), "text": text(ROWS)}, []
    for _ in range(STEPS):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert int(metrics["failed"]) == -1
    return state, losses


def draw(family, state, rows):
    keys = jax.random.split(jax.random.key(1), rows)
    settings = SampleSettings(image=SHAPES.image)
    inputs = state.ema_params, {}, text(rows), text(rows), keys, settings
    return np.asarray(jax.jit(family.sample)(*inputs)), np.asarray(jax.jit(family.trace, static_argnums=6)(*inputs, 3))


def test_the_worked_example_learns_and_draws_what_its_captions_say(family, learned):
    state, losses = learned
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:10])
    drawn, seen = draw(family, state, 32)
    assert drawn.dtype == np.uint8
    assert drawn.shape == (32, 8, 8, 3)
    level = drawn[:, :, 4:].mean((1, 2, 3))
    assert np.abs(level[::2] - 40).mean() < 25
    assert np.abs(level[1::2] - 200).mean() < 25
    end = drawn[1::2, :, :2].mean((1, 2, 3))  # of one caption, both kinds of picture
    assert end.max() > 170
    assert end.min() < 70
    assert seen.shape == (3, *drawn.shape)
    np.testing.assert_array_equal(seen[-1], drawn)


def test_of_several_tries_the_nearest_learns(family):
    batch = {"image": jnp.asarray(pictures(ROWS) / 127.5 - 1, jnp.float32), "text": text(ROWS)}
    params, key = family.init(jax.random.key(0), SHAPES), jax.random.key(2)
    loss, metrics = jax.jit(family.losses)(params, {}, batch, key)["generator"]
    z = jax.random.normal(key, (family.tries, ROWS, 4))
    drawn = jax.jit(lambda z: family._draw(params, z, batch["text"], SHAPES.image))
    made = np.stack([np.asarray(drawn(z[k])) for k in range(family.tries)])
    off = np.square(made - np.asarray(batch["image"])).mean((2, 3, 4))
    np.testing.assert_allclose(loss, off.min(0).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["farthest"], off.max(0).mean(), rtol=1e-5)


def test_it_is_chosen_and_checked_as_the_others_are(family):
    config = configs.apply_overrides(RunConfig(), ["family=imle", "family.network=dcgan", "family.tries=2"])
    assert config.family == type(family)(network=DCGAN(), tries=2)
    assert configs.from_dict(RunConfig, configs.to_dict(config)) == config
    with pytest.raises(UserError, match=r"family.tries=0 must be at least 1"):
        configs.finalize(dataclasses.replace(config, family=dataclasses.replace(config.family, tries=0)))
    axes = jax.tree.map(len, family.logical_axes(SHAPES), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert axes == jax.tree.map(jnp.ndim, jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES)))
