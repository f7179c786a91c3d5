import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.ddpm import DDPM
from jaxgen.families.unet import UNet
from jaxgen.nn.module import bind
from tests.families.test_flow import Oracle, text

SHAPES = Shapes((8, 8, 3), 12, 10)
FAMILY = DDPM(network=UNet(patch=2, widths=(8,), down=(1,), up=(0,), attention=("none",), head_dim=8, refiner=0))
SETTINGS = SampleSettings(image=SHAPES.image, sampler="ddim", num_steps=4, guidance_scale=1.0)
NOTHING = {"generator": {"unused": jnp.zeros(())}}


@functools.cache
def params():
    """Every weight random, also those that start at zero."""
    leaves, tree = jax.tree.flatten(FAMILY.init(jax.random.key(0), SHAPES))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


def beta(schedule, k, steps):
    """By hand, for one step of 1 … T."""
    if schedule == "linear":
        return (1e-4 + (0.02 - 1e-4) * (k - 1) / (steps - 1)) * 1000 / steps
    level = [np.cos((j / steps + 0.008) / 1.008 * np.pi / 2) ** 2 for j in (k - 1, k)]
    return min(1 - level[1] / level[0], 0.999)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_is_the_product_of_what_each_step_leaves(schedule, steps):
    levels = DDPM(schedule=schedule, num_timesteps=steps).alpha_bar()
    expected = np.cumprod([1.0] + [1 - beta(schedule, k, steps) for k in range(1, steps + 1)])
    np.testing.assert_allclose(levels, expected, rtol=1e-9)


def test_the_ends_of_the_schedules():
    linear, cosine = DDPM().alpha_bar(), DDPM(schedule="cosine").alpha_bar()
    assert linear[0] == cosine[0] == 1.0
    np.testing.assert_allclose([linear[1], linear[1000]], [0.9999, 4.0358e-5], rtol=1e-4)
    # Half of the cosine's variance is noise in the middle, but for its offset; the last step leaves a thousandth.
    np.testing.assert_allclose(
        np.sqrt(cosine[500]), np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    )
    np.testing.assert_allclose(cosine[1000] / cosine[999], 1e-3, rtol=1e-9)


def test_the_levels_of_nearly_clean_pictures_are_exact():
    signal, sigma = DDPM()._levels(jnp.array([1, 2]))
    noise = 1 - np.array([0.9999, 0.9999 * (1 - beta("linear", 2, 1000))])
    np.testing.assert_allclose(sigma, np.sqrt(noise), rtol=1e-6)
    np.testing.assert_allclose(signal, np.sqrt(1 - noise), rtol=1e-6)


def test_the_loss_is_the_squared_error_of_the_noise():
    family, key, weights = dataclasses.replace(FAMILY, schedule="cosine"), jax.random.key(5), params()
    image = jax.random.uniform(jax.random.key(2), (4, *SHAPES.image), minval=-1, maxval=1)
    loss, _ = jax.jit(family.losses)(weights, {}, {"image": image, "text": text()}, key)["generator"]
    step_key, noise_key, _ = jax.random.split(key, 3)
    k = np.asarray(jax.random.randint(step_key, (4,), 1, 1001))
    left = family.alpha_bar()[k][:, None, None, None]
    noise = np.asarray(jax.random.normal(noise_key, image.shape), np.float64)
    x = np.sqrt(left) * np.asarray(image, np.float64) + np.sqrt(1 - left) * noise
    net = bind(lambda rngs: family.network.build(rngs, SHAPES, 3), weights["generator"])
    predicted = jax.jit(net)(jnp.asarray(x, jnp.float32), jnp.asarray(k / 1000, jnp.float32), text())
    np.testing.assert_allclose(loss, np.mean((np.asarray(predicted, np.float64) - noise) ** 2), rtol=1e-5)


def test_all_steps_are_trained_alike():
    seen = []
    family = DDPM(network=Oracle(lambda _, t: seen.append(t) or 0 * t), num_timesteps=25)
    family.losses(NOTHING, {}, {"image": jnp.zeros((5000, 1, 1, 1)), "text": text(5000)}, jax.random.key(0))
    steps, counts = np.unique(np.round(np.asarray(seen[0]).ravel() * 25), return_counts=True)
    np.testing.assert_array_equal(steps, np.arange(1, 26))
    np.testing.assert_allclose(counts, 200, atol=60)


class Noise(Oracle):
    """The best prediction of the noise where pixels are Gaussian of mean `mean` (or one by caption) and deviation `spread`."""

    def __init__(self, family, mean, spread=0.0):
        table = np.asarray(family.alpha_bar(), np.float64)

        def known(x, t, mean):
            left = jnp.asarray(table, jnp.float32)[jnp.round(t * family.num_timesteps).astype(int)]
            return jnp.sqrt(1 - left) * (x - jnp.sqrt(left) * mean) / (left * spread**2 + 1 - left)

        super().__init__(lambda x, t: known(x, t, mean))


def draw(family, rows=2, **change):
    settings = dataclasses.replace(SETTINGS, **change)
    return np.asarray(family.sample(NOTHING, {}, text(rows), text(rows), jax.random.split(jax.random.key(0), rows), settings))


@pytest.mark.parametrize("steps", [1, 7, 1000, 2000])
@pytest.mark.parametrize("sampler", DDPM.samplers)
def test_knowing_the_noise_one_lands_on_the_picture(sampler, steps):
    clean = jnp.linspace(-1, 1, 8 * 8 * 3).reshape(SHAPES.image)
    family = DDPM(network=Noise(DDPM(), clean))
    expected = np.round((np.asarray(clean) + 1) * 127.5)
    drawn = draw(family, sampler=sampler, num_steps=steps).astype(int)
    np.testing.assert_allclose(drawn, np.broadcast_to(expected, drawn.shape), atol=1)


def by_hand(family, taken, sampler, mean, spread):
    """(mean, deviation) of what the sampler draws of Gaussian pixels, float64, by the paper's posterior (its eq. 7)."""
    levels, m, v = family.alpha_bar(), 0.0, 1.0
    for now, after in itertools.pairwise(taken):
        a, b = levels[now], levels[after]
        # The noise predicted for x, an affine function of x, and with it the clean picture.
        slope = (1 - a) ** 0.5 / (a * spread**2 + 1 - a)
        clean = (1 - (1 - a) ** 0.5 * slope) / a**0.5, (1 - a) ** 0.5 * slope * mean
        if sampler == "ddim":
            gain = b**0.5 * clean[0] + (1 - b) ** 0.5 * slope
            shift = b**0.5 * clean[1] - (1 - b) ** 0.5 * slope * a**0.5 * mean
            extra = 0.0
        else:
            alpha = a / b
            of_clean, of_x = b**0.5 * (1 - alpha) / (1 - a), alpha**0.5 * (1 - b) / (1 - a)
            gain, shift, extra = of_clean * clean[0] + of_x, of_clean * clean[1], (1 - b) / (1 - a) * (1 - alpha)
        m, v = gain * m + shift, gain**2 * v + extra
    return m, v**0.5


@pytest.mark.parametrize(("sampler", "taken"), [("ddim", [50, 25, 0]), ("ddpm", [50, 25, 0]), ("ddpm", range(50, -1, -1))])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_gaussian_pictures_are_drawn_with_the_mean_and_deviation_of_the_closed_form(sampler, taken, schedule):
    plain = DDPM(schedule=schedule, num_timesteps=50, clip=False)
    family = dataclasses.replace(plain, network=Noise(plain, 0.2, 0.25))
    pixels = draw(family, rows=48, sampler=sampler, num_steps=len(taken) - 1) / 127.5 - 1
    mean, deviation = by_hand(plain, list(taken), sampler, 0.2, 0.25)
    np.testing.assert_allclose(pixels.mean(), mean, atol=4 * deviation / pixels.size**0.5)
    np.testing.assert_allclose(pixels.std(), deviation, rtol=0.03)


def test_over_all_steps_the_closed_form_is_nearly_the_datas():
    """The posterior's variance is that of a known picture, too small for any other."""
    for schedule in ("linear", "cosine"):
        mean, deviation = by_hand(DDPM(schedule=schedule), list(range(1000, -1, -1)), "ddpm", 0.2, 0.25)
        print(schedule, mean, deviation)
        np.testing.assert_allclose([mean, deviation], [0.2, 0.25], rtol=0.03)


def test_ddim_converges_to_the_flow_that_scales_the_noise():
    plain = DDPM(clip=False)
    family = dataclasses.replace(plain, network=Noise(plain, 0.2, 0.25))
    noise = jax.vmap(lambda k: jax.random.normal(k, SHAPES.image))(jax.random.split(jax.random.key(0), 8))
    error = lambda steps: np.abs(draw(family, 8, num_steps=steps) / 127.5 - 1 - np.clip(0.2 + 0.25 * noise, -1, 1)).mean()  # noqa: E731
    assert error(400) < 0.005
    assert error(100) < 0.5 * error(20)


def test_guidance_leads_from_the_null_caption_through_the_text_and_beyond():
    class Either(Oracle):
        def build(self, rngs, shapes, out):
            yes, no = (Noise(DDPM(), value).build(rngs, shapes, out) for value in (0.25, 0.0))

            class Network(type(yes)):
                def __call__(self, x, t, text, key=None):
                    choose = text.pooled[:, :1, None, None] > 0
                    return jnp.where(choose, yes(x, t, text), no(x, t, text))

            return Network()

    family = DDPM(network=Either(None))
    yes, no = (dataclasses.replace(text(1), pooled=jnp.full((1, 10), sign)) for sign in (1.0, -1.0))
    keys = jax.random.split(jax.random.key(0), 1)
    seen = lambda **change: int(  # noqa: E731
        family.sample(NOTHING, {}, yes, no, keys, dataclasses.replace(SETTINGS, **change))[0, 0, 0, 0]
    )
    level = lambda x: round((x + 1) * 127.5)  # noqa: E731
    assert abs(seen(guidance_scale=1.0) - level(0.25)) <= 1
    assert abs(seen(guidance_scale=0.0) - level(0.0)) <= 1
    assert abs(seen(guidance_scale=3.0) - level(0.75)) <= 1
    assert abs(seen(guidance_scale=3.0, guidance_low=2.0, guidance_high=3.0) - level(0.25)) <= 1  # never inside the interval


@pytest.mark.parametrize("clip", [True, False])
def test_a_step_leads_towards_a_picture_within_bounds(clip):
    family = DDPM(network=Noise(DDPM(), jnp.full(SHAPES.image, 1.5)), clip=clip)
    x, key = jax.random.normal(jax.random.key(3), (2, *SHAPES.image)), jax.random.split(jax.random.key(0), 2)
    step, count = family._stepper(NOTHING, text(2), text(2), key, SETTINGS)
    after, clean = step(2, x)
    assert int(count) == 4
    a, b = DDPM().alpha_bar()[[500, 250]]
    aim = 1.0 if clip else 1.5
    np.testing.assert_allclose(clean, np.full(clean.shape, aim), rtol=1e-3)
    expected = b**0.5 * aim + (1 - b) ** 0.5 * (np.asarray(x, np.float64) - a**0.5 * aim) / (1 - a) ** 0.5
    np.testing.assert_allclose(after, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_a_trace_ends_with_what_is_drawn(frames):
    family, settings = DDPM(network=Noise(DDPM(), 0.1, 0.3)), dataclasses.replace(SETTINGS, sampler="ddpm")
    inputs = (NOTHING, {}, text(2), text(2), jax.random.split(jax.random.key(6), 2), settings)
    seen = family.trace(*inputs, frames)
    assert seen.shape == (frames, 2, *SHAPES.image)
    assert np.abs(np.asarray(seen[-1], int) - np.asarray(family.sample(*inputs), int)).max() <= 1


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"data.image_size=9 is no multiple of 2"):
        FAMILY.init(jax.random.key(0), Shapes((9, 9, 3), 12, 10))
    with pytest.raises(UserError, match=r"family.num_timesteps=10 is too few"):
        DDPM(num_timesteps=10).validate()
