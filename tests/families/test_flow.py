import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.flow import MIN_TIME, Flow
from jaxgen.families.transformer import Transformer
from jaxgen.families.unet import UNet
from jaxgen.text.features import TextFeatures

SHAPES = Shapes((16, 16, 3), 12, 10)
UNET = UNet(widths=(8, 16), down=(1, 1), up=(1, 1), head_dim=8)
NETWORKS = [UNET, Transformer(patch=4, width=32, depth=2, head_dim=8)]
SETTINGS = SampleSettings(image=SHAPES.image, num_steps=4)


def text(batch=4, tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, tokens, 12)).astype(np.float32)
    pooled = rng.normal(size=(batch, 10)).astype(np.float32)
    return TextFeatures(jnp.asarray(hidden), jnp.asarray(pooled), jnp.asarray(np.arange(tokens) < 4)[None].repeat(batch, 0))


def random_params(family, scale=0.2):
    """Every weight random, also those that start at zero, so that nothing is invisible to a test."""
    params = family.init(jax.random.key(0), SHAPES)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


@functools.cache
def predict(family):
    return jax.jit(family._predict)


@pytest.fixture(params=NETWORKS, ids=["unet", "transformer"])
def family(request):
    return Flow(network=request.param)


class Oracle:
    """A network that knows the clean picture: `clean` (or a function of x and t), `other` where the pooled text is < 0."""

    def __init__(self, clean, other=None):
        self.clean, self.other = clean, clean if other is None else other

    def check_image(self, image):
        pass

    def build(self, rngs, shapes, out):
        from flax import nnx

        oracle = self

        class Network(nnx.Module):
            def __init__(self):
                self.unused = nnx.Param(jnp.zeros(()), axes=())

            def __call__(self, x, t, text, key=None):
                if callable(oracle.clean):
                    return oracle.clean(x, t[:, None, None, None])
                choose = text.pooled[:, :1, None, None] > 0
                return jnp.where(choose, oracle.clean, oracle.other)

        return Network()


@pytest.mark.parametrize("min_time", [MIN_TIME, 0.3])
def test_the_loss_is_the_squared_error_of_the_velocity(family, min_time):
    family = dataclasses.replace(family, loss_min_time=min_time)
    params, key = random_params(family), jax.random.key(5)
    image = jax.random.uniform(jax.random.key(2), (4, *SHAPES.image), minval=-1, maxval=1)
    loss, metrics = jax.jit(family.losses)(params, {}, {"image": image, "text": text()}, key)["generator"]
    time_key, noise_key, _dropout_key = jax.random.split(key, 3)
    t = np.asarray(family.draw_times(time_key, 4), np.float64)[:, None, None, None]
    noise = np.asarray(jax.random.normal(noise_key, image.shape), np.float64)
    x_t = (1 - t) * np.asarray(image, np.float64) + t * noise
    clean = predict(family)(params, jnp.asarray(x_t, jnp.float32), jnp.asarray(t[:, 0, 0, 0], jnp.float32), text())
    floor = np.maximum(t, min_time)
    difference = (x_t - np.asarray(clean, np.float64)) / floor - (x_t - np.asarray(image, np.float64)) / floor
    np.testing.assert_allclose(loss, np.mean(difference**2), rtol=2e-5)
    np.testing.assert_allclose(metrics["clean_mse"], np.mean((np.asarray(clean) - np.asarray(image)) ** 2), rtol=2e-5)


def test_padding_tokens_do_not_count(family):
    params, words = random_params(family), text()
    x, t = jax.random.normal(jax.random.key(3), (4, *SHAPES.image)), jnp.full((4,), 0.7)
    padded = dataclasses.replace(
        words,
        hidden=jnp.pad(words.hidden, ((0, 0), (0, 5), (0, 0)), constant_values=9.0),
        mask=jnp.pad(words.mask, ((0, 0), (0, 5))),
    )
    plain = predict(family)(params, x, t, words)
    np.testing.assert_allclose(plain, predict(family)(params, x, t, padded), atol=1e-5)
    other = dataclasses.replace(words, hidden=words.hidden.at[:, 1].add(1.0))
    assert float(jnp.abs(plain - predict(family)(params, x, t, other)).max()) > 1e-3  # real tokens do
    other = dataclasses.replace(words, pooled=words.pooled.at[:, 1].add(1.0))
    assert float(jnp.abs(plain - predict(family)(params, x, t, other)).max()) > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_a_perfect_prediction_is_drawn_exactly(sampler):
    clean = jnp.linspace(-1, 1, 16 * 16 * 3).reshape(SHAPES.image)
    family = Flow(network=Oracle(clean))
    params = {"generator": {"unused": jnp.zeros(())}}
    settings = dataclasses.replace(SETTINGS, sampler=sampler, guidance_scale=1.0)
    drawn = family.sample(params, {}, text(2), text(2), jax.random.split(jax.random.key(0), 2), settings)
    expected = np.round((np.asarray(clean) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(drawn), np.broadcast_to(expected, drawn.shape))


def test_guidance_leads_from_the_null_caption_through_the_text_and_beyond():
    high, low = jnp.full(SHAPES.image, 0.25), jnp.full(SHAPES.image, 0.0)
    family = Flow(network=Oracle(high, low))
    params = {"generator": {"unused": jnp.zeros(())}}
    yes = dataclasses.replace(text(1), pooled=jnp.ones((1, 10)))
    no = dataclasses.replace(text(1), pooled=-jnp.ones((1, 10)))
    draw = lambda **change: int(  # noqa: E731
        family.sample(params, {}, yes, no, jax.random.split(jax.random.key(0), 1), dataclasses.replace(SETTINGS, **change))[
            0, 0, 0, 0
        ]
    )
    level = lambda x: round((x + 1) * 127.5)  # noqa: E731
    assert draw(guidance_scale=1.0) == level(0.25)
    assert draw(guidance_scale=0.0) == level(0.0)
    assert draw(guidance_scale=3.0) == level(0.75)
    assert draw(guidance_scale=3.0, guidance_low=2.0, guidance_high=3.0) == level(0.25)  # never inside the interval


class Gaussian(Oracle):
    """The best prediction where pictures are Gaussian noise of deviation `spread`: the flow then scales the noise by it."""

    def __init__(self, spread):
        super().__init__(lambda x, t: (1 - t) * spread**2 / ((1 - t) ** 2 * spread**2 + t**2) * x)


def test_the_samplers_converge_to_the_exact_flow_and_heun_faster():
    params = {"generator": {"unused": jnp.zeros(())}}
    keys = jax.random.split(jax.random.key(4), 8)
    noise = np.asarray(jax.vmap(lambda k: jax.random.normal(k, SHAPES.image))(keys))
    exact = np.clip(0.3 * noise, -1, 1)
    family = Flow(network=Gaussian(0.3))
    draw = jax.jit(lambda settings: family.sample(params, {}, text(8), text(8), keys, settings))

    def error(sampler, steps):
        settings = dataclasses.replace(SETTINGS, sampler=sampler, num_steps=steps, guidance_scale=1.0)
        return np.abs(np.asarray(draw(settings)) / 127.5 - 1 - exact).mean()

    assert error("heun", 16) < 0.3 * error("euler", 16)
    assert error("euler", 64) < 0.4 * error("euler", 16)
    assert error("heun", 200) < 0.01


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_a_trace_shows_the_clean_picture_ever_later_and_ends_with_what_is_drawn(frames):
    family = Flow(network=Gaussian(0.3))
    params = {"generator": {"unused": jnp.zeros(())}}
    keys = jax.random.split(jax.random.key(4), 2)
    settings = dataclasses.replace(SETTINGS, guidance_scale=1.0)
    inputs = params, {}, text(2), text(2), keys, settings
    seen, drawn = family.trace(*inputs, frames), family.sample(*inputs)
    assert seen.shape == (frames, *drawn.shape)
    np.testing.assert_array_equal(seen[-1], drawn)
    if frames == 3:  # of four steps: the first frame is the prediction from the noise alone, which is grey
        assert np.abs(np.asarray(seen[0], int) - 128).max() <= 1
        assert np.asarray(seen[1], float).std() < np.asarray(drawn, float).std()


def test_numbers_are_traced_and_one_picture_ignores_its_batch(family):
    params = random_params(family)
    null = jax.tree.map(lambda a: jnp.repeat(a[:1], 4, axis=0), text(1, seed=1))
    keys = jax.random.split(jax.random.key(6), 4)
    draw = jax.jit(lambda words, keys, settings: family.sample(params, {}, words, null, keys, settings))
    first = draw(text(), keys, SETTINGS)
    again = draw(text(), keys, dataclasses.replace(SETTINGS, num_steps=5, guidance_scale=2.0))
    assert draw._cache_size() == 1
    assert (np.asarray(first) != np.asarray(again)).any()
    swapped = draw(jax.tree.map(lambda a: a[::-1], text()), keys[::-1], SETTINGS)
    assert np.abs(np.asarray(swapped)[::-1].astype(int) - np.asarray(first).astype(int)).max() <= 1


def test_times_follow_the_logit_normal():
    t = np.asarray(Flow(time_mean=0.5, time_std=0.8, time_uniform=0.0).draw_times(jax.random.key(0), 20_000))
    logits = np.log(t) - np.log1p(-t)
    assert abs(logits.mean() - 0.5) < 0.02
    assert abs(logits.std() - 0.8) < 0.02
    uniform = np.asarray(Flow(time_uniform=1.0).draw_times(jax.random.key(0), 20_000))
    np.testing.assert_allclose(np.quantile(uniform, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)


def test_dropout_acts_in_training_only():
    family = Flow(network=dataclasses.replace(UNET, dropout=0.5))
    params = random_params(family)
    x, t = jnp.ones((2, *SHAPES.image)), jnp.full((2,), 0.5)
    one, two = (predict(family)(params, x, t, text(2), jax.random.key(k)) for k in (0, 1))
    assert float(jnp.abs(one - two).max()) > 1e-3
    np.testing.assert_array_equal(*(predict(family)(params, x, t, text(2)) for _ in range(2)))


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(UserError, match=r"data.image_size=30 is no multiple of 4"):
        Flow(network=UNET).init(jax.random.key(0), Shapes((30, 30, 3), 12, 10))
    with pytest.raises(UserError, match="head_dim"):
        Transformer(width=100, head_dim=64).validate()
    with pytest.raises(UserError, match="one entry a level"):
        UNet(widths=(8,)).validate()


@pytest.mark.parametrize("network", NETWORKS, ids=["unet", "transformer"])
def test_flops_are_those_xla_counts(network):
    family, shapes = Flow(network=network), Shapes((64, 64, 3), 12, 10)  # large, as XLA leaves out what padding multiplies
    params = family.init(jax.random.key(0), shapes)
    run = jax.jit(lambda x, t, words: predict(family)(params, x, t, words))
    cost = run.lower(jnp.ones((1, *shapes.image)), jnp.ones((1,)), text(1)).compile().cost_analysis()
    # XLA also counts element-wise work, which is a large share in a network this small.
    assert 0.6 < family.flops(shapes, 6) / cost["flops"] < 1.05
