import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import config
from jaxgen.errors import UserError
from jaxgen.families.augment import augment
from jaxgen.families.base import SampleSettings, Shapes, to_uint8
from jaxgen.families.gan import Gan, other_captions
from jaxgen.families.gan_networks import DCGAN, Residual
from jaxgen.nn.module import bind, param
from jaxgen.text.features import TextFeatures
from jaxgen.train.config import RunConfig

SHAPES = Shapes((8, 8, 3), 12, 10)
RESIDUAL = Residual(
    noise=6, widths=(8, 16), blocks=(1, 1), seen_widths=(8,), seen_blocks=(1,), judge_width=16, judge_blocks=1,
    head_dim=8, refiner=1,
)  # fmt: skip
SMALLEST = dataclasses.replace(RESIDUAL, widths=(16,), blocks=(1,), attention=("joint",), refiner=0)
NETWORKS = {"residual": RESIDUAL, "dcgan": DCGAN(noise=6, width=8, text=4)}
SETTINGS = SampleSettings(image=SHAPES.image)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
PIXELS = math.prod(SHAPES.image)


def text(batch=4, tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, tokens, 12)).astype(np.float32)
    pooled = rng.normal(size=(batch, 10)).astype(np.float32)
    return TextFeatures(jnp.asarray(hidden), jnp.asarray(pooled), jnp.asarray(np.arange(tokens) < 4)[None].repeat(batch, 0))


def random_params(family, shapes=SHAPES, scale=0.2):
    """Every weight random, also those that start at zero, so that nothing is invisible to a test."""
    abstract = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(scale * rng.normal(size=p.shape), jnp.float32), abstract)


@dataclasses.dataclass(frozen=True)
class Plain:
    """Pictures z w + v; logits x a p + |x|² q / 2 for pooled text p: all gradients are known in closed form."""

    noise: int = 3

    def check_image(self, image):
        pass

    def generator(self, rngs, shapes):
        class Generator(nnx.Module):
            def __init__(self, noise):
                normal = nnx.initializers.normal(0.3)
                self.w = param(normal, rngs, (noise, PIXELS), (None, None))
                self.v = param(normal, rngs, (PIXELS,), (None,))

            def __call__(self, noise, text):
                return (noise @ self.w[...] + self.v[...]).reshape(-1, *shapes.image)

        return Generator(self.noise)

    def discriminator(self, rngs, shapes):
        class Discriminator(nnx.Module):
            def __init__(self):
                normal = nnx.initializers.normal(0.1)
                self.a = param(normal, rngs, (PIXELS, shapes.pooled), (None, None))
                self.q = param(normal, rngs, (), ())

            def read(self, text):
                return text.pooled

            def look(self, image):
                return image.reshape(len(image), -1)

            def judge(self, seen, reading):
                squares = self.q[...] / 2 * jnp.sum(jnp.square(seen), axis=-1)
                return jnp.sum(seen @ self.a[...] * reading, axis=-1) + squares

        return Discriminator()


def plain_batch(size=6):
    image = np.random.default_rng(3).uniform(-1, 1, (size, *SHAPES.image)).astype(np.float32)
    return {"image": jnp.asarray(image), "text": text(size)}


def reference(family, params, batch, key):
    """{group: loss} of the Plain pair in float64, from `params` as nested dictionaries of NumPy arrays."""
    noise_key, discriminator_key, _ = jax.random.split(key, 3)
    _, wrong_key, _ = jax.random.split(discriminator_key, 3)
    size = len(batch["image"])
    z = np.asarray(jax.random.normal(noise_key, (size, 3)), np.float64)
    wrong = np.asarray(other_captions(batch["text"], wrong_key)[0])
    p = np.asarray(batch["text"].pooled, np.float64)
    real = np.asarray(batch["image"], np.float64).reshape(size, -1)
    g, d = params["generator"], params["discriminator"]
    fake = z @ g["w"] + g["v"]
    logits = lambda x, p: np.sum(x @ d["a"] * p, -1) + d["q"] / 2 * np.sum(x**2, -1)  # noqa: E731
    r, f, w = logits(real, p), logits(fake, p), logits(real, p[wrong])
    softplus = lambda x: np.logaddexp(0, x)  # noqa: E731
    hinge = lambda x: np.maximum(0, 1 + x)  # noqa: E731
    m = family.mismatch
    discriminator, generator = {
        "relativistic": (softplus(f - r) + m * softplus(w - r), softplus(r - f)),
        "nonsaturating": (softplus(-r) + softplus(f) + m * softplus(w), softplus(-f)),
        "hinge": (hinge(-r) + hinge(f) + m * hinge(w), -f),
    }[family.loss]
    for weight, x in ((family.r1, real), (family.r2, fake)):
        discriminator = discriminator + weight / 2 * np.sum((p @ d["a"].T + d["q"] * x) ** 2, -1)
    return {"discriminator": discriminator.mean(), "generator": generator.mean()}


WEIGHTS = {"r1": 0.3, "r2": 0.7, "mismatch": 0.5}


@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        ("relativistic", WEIGHTS),
        ("nonsaturating", WEIGHTS),
        ("hinge", WEIGHTS),
        ("relativistic", {"r1": 0.0, "r2": 0.7, "mismatch": 0.0}),
    ],
)
def test_losses_and_gradients_are_those_of_a_float64_reference(loss, weights):
    family = Gan(network=Plain(), loss=loss, penalty_every=1, **weights)
    params, batch, key = random_params(family), plain_batch(), jax.random.key(5)
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    rng = np.random.default_rng(7)
    for group in family.groups:
        value = lambda tree, group=group: family.losses({**params, group: tree}, {}, batch, key)[group][0]  # noqa: E731
        got, gradient = jax.value_and_grad(value)(params[group])
        np.testing.assert_allclose(got, reference(family, wide, batch, key)[group], rtol=1e-5)
        for name in gradient:  # along a random direction, by central differences in float64
            way = rng.normal(size=wide[group][name].shape)
            sides = [
                reference(family, {**wide, group: {**wide[group], name: wide[group][name] + e * way}}, batch, key)[group]
                for e in (1e-5, -1e-5)
            ]
            slope = np.sum(np.asarray(gradient[name], np.float64) * way)
            np.testing.assert_allclose(slope, (sides[0] - sides[1]) / 2e-5, rtol=2e-4, atol=1e-5, err_msg=f"{group}.{name}")


def test_penalties_are_reported_and_weigh_half_their_gamma():
    family = Gan(network=Plain(), r1=0.3, r2=0.7, mismatch=0.0, penalty_every=1)
    params, batch, key = random_params(family), plain_batch(), jax.random.key(5)
    loss, metrics = family.losses(params, {}, batch, key)["discriminator"]
    d, p = params["discriminator"], np.asarray(batch["text"].pooled, np.float64)
    x = np.asarray(batch["image"], np.float64).reshape(6, -1)
    squares = np.sum((p @ np.asarray(d["a"], np.float64).T + float(d["q"]) * x) ** 2, -1)
    np.testing.assert_allclose(metrics["r1"], squares.mean(), rtol=1e-5)
    free = dataclasses.replace(family, r1=0.0, r2=0.0)
    without, fewer = free.losses(params, {}, batch, key)["discriminator"]
    assert not {"r1", "r2"} & fewer.keys()
    np.testing.assert_allclose(loss - without, 0.15 * metrics["r1"] + 0.35 * metrics["r2"], rtol=1e-4)


@pytest.mark.parametrize(("size", "every", "parts"), [(8, 4, 4), (6, 4, 2), (6, 5, 1), (4, 4, 4)])
def test_penalties_on_a_part_of_the_batch_are_exact_in_expectation(size, every, parts):
    family = Gan(network=Plain(), r1=0.3, r2=0.7, penalty_every=every)
    params, image = random_params(family), plain_batch(size)["image"]
    network = bind(lambda rngs: Plain().discriminator(rngs, SHAPES), params["discriminator"])
    reading = text(size).pooled
    pairs = jnp.stack([image, 0.5 * image[::-1]], axis=1)
    measure = lambda family, key: family._penalties(network, pairs, reading, key)  # noqa: E731
    some = jax.jit(jax.vmap(lambda key: measure(family, key)))(jax.random.split(jax.random.key(0), 400))
    whole = measure(dataclasses.replace(family, penalty_every=1), jax.random.key(0))
    for name in ("r1", "r2"):
        values, counts = np.unique(np.asarray(some[name]), return_counts=True)
        assert len(values) == parts
        assert counts.min() > 400 / parts * 0.6  # each part about as often
        np.testing.assert_allclose(values.mean(), whole[name], rtol=1e-5)


def test_a_mismatched_caption_is_another_one():
    words = text(8)
    again = jnp.array([0, 1, 2, 3, 0, 0, 0, 1])  # captions 0 and 1 come several times
    words = jax.tree.map(lambda a: a[again], words)
    words = dataclasses.replace(words, hidden=words.hidden.at[:, 4:].set(jax.random.normal(jax.random.key(9), (8, 2, 12))))
    rows, exists = jax.jit(jax.vmap(lambda key: other_captions(words, key)))(jax.random.split(jax.random.key(0), 500))
    rows, exists, again = np.asarray(rows), np.asarray(exists), np.asarray(again)
    assert exists[:, 2].all()
    assert exists.mean() > 0.98
    assert (again[rows] != again)[exists].all()
    # Evenly among the rows that say something else: three of eight for row 0, seven for row 2.
    shares = np.bincount(rows[exists[:, 0], 0], minlength=8) / exists[:, 0].sum()
    np.testing.assert_allclose(shares, [0, 0.25, 0.25, 0.25, 0, 0, 0, 0.25], atol=0.08)
    np.testing.assert_allclose(np.bincount(rows[:, 2], minlength=8) / 500, (np.arange(8) != 2) / 7, atol=0.06)
    # The order of words is part of a caption, whatever the size of the features; the pooled text is not asked.
    turned = jax.tree.map(lambda a: a[:1].repeat(2, axis=0), text(1))
    turned = dataclasses.replace(turned, hidden=1e-3 * turned.hidden.at[1, :4].set(turned.hidden[1, 3::-1]))
    rows, exists = other_captions(turned, jax.random.key(0))
    assert exists.all()
    np.testing.assert_array_equal(rows, [1, 0])


def test_a_batch_of_one_caption_has_no_mismatched_term():
    family = Gan(network=Plain(), r1=0, r2=0)
    params, batch = random_params(family), plain_batch()
    batch["text"] = jax.tree.map(lambda a: a[:1].repeat(6, axis=0), batch["text"])
    assert not other_captions(batch["text"], jax.random.key(0))[1].any()
    losses = [dataclasses.replace(family, mismatch=m).losses(params, {}, batch, jax.random.key(1)) for m in (0.0, 1.0)]
    np.testing.assert_allclose(losses[0]["discriminator"][0], losses[1]["discriminator"][0], rtol=1e-6)


def test_the_text_learns_nothing_from_the_discriminator():
    family = Gan(network=Plain())  # its generator does not read
    params, batch = random_params(family), plain_batch()

    def loss(pooled, group):
        words = dataclasses.replace(batch["text"], pooled=pooled)
        return family.losses(params, {}, {**batch, "text": words}, jax.random.key(1))[group][0]

    for group in family.groups:
        assert not jax.grad(loss)(batch["text"].pooled, group).any()


@pytest.mark.parametrize(("gamma", "converges"), [(0.5, True), (0.0, False)])
def test_penalties_make_a_game_converge_that_turns_in_circles_without(gamma, converges):
    # Real pictures are all alike (Mescheder et al., arXiv 1801.04406: the Dirac-GAN).
    family = Gan(network=Plain(noise=1), r1=gamma, r2=gamma, mismatch=0.0, penalty_every=1)
    params = jax.tree.map(jnp.zeros_like, random_params(family))
    image = jnp.full((2, *SHAPES.image), 1.0 / math.sqrt(PIXELS))  # at distance 1 from what is drawn first
    words = dataclasses.replace(text(2), pooled=jnp.zeros((2, 10)).at[:, 0].set(1.0))

    @jax.jit
    def run(params):
        def step(params, key):
            for group in family.groups:
                loss = lambda tree, group=group, params=params: (  # noqa: E731
                    family.losses({**params, group: tree}, {}, {"image": image, "text": words}, key)[group][0]
                )
                gradient = jax.grad(loss)(params[group])
                gradient = {name: g * (name in ("a", "v")) for name, g in gradient.items()}  # a line, and a point
                params = {**params, group: jax.tree.map(lambda p, g: p - 0.1 * g, params[group], gradient)}
            return params, jnp.linalg.norm(params["generator"]["v"] - image[0].reshape(-1))

        return jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 600))[1]

    distance = np.asarray(run(params))
    assert (distance[-50:].max() < 0.02) == converges
    assert (distance[-200:].max() > 0.3) != converges


@functools.cache
def compiled(name):
    """(pictures from latents and text, logits from pictures and text) by one network."""
    family = Gan(network=NETWORKS[name])
    params = random_params(family, scale=0.5)
    network = bind(family.build("discriminator", SHAPES), params["discriminator"])
    draw = lambda latent, words: family._generate(params, latent, words, SHAPES.image)  # noqa: E731
    score = lambda image, words: network.judge(network.look(image), network.read(words))  # noqa: E731
    return tuple(jax.jit(function, compiler_options=QUICK) for function in (draw, score))


@pytest.mark.parametrize("name", NETWORKS)
def test_examples_do_not_mix_and_padding_does_not_count(name):
    draw, score = compiled(name)
    latent, words = jax.random.normal(jax.random.key(3), (4, 6)), text()
    image = jax.random.normal(jax.random.key(4), (4, *SHAPES.image))
    other = dataclasses.replace(words, hidden=words.hidden.at[:, 4:].add(3.0))
    replaced = jax.tree.map(lambda a, b: a.at[1:].set(b[1:]), (latent, image, words), (latent + 1, -image, text(seed=2)))
    for function, x, y in ((draw, latent, replaced[0]), (score, image, replaced[1])):
        plain = function(x, words)
        np.testing.assert_allclose(plain, function(x, other), atol=1e-5)
        np.testing.assert_allclose(plain[0], function(y, replaced[2])[0], atol=1e-5)
        assert float(jnp.abs(plain - function(y, words))[1:].max()) > 1e-2
        assert float(jnp.abs(plain - function(x, dataclasses.replace(words, pooled=words.pooled + 1))).max()) > 1e-3


def test_what_is_bound_to_what_is_seen_in_the_tokens():
    draw, score = compiled("residual")
    words = text()
    turned = dataclasses.replace(words, hidden=words.hidden.at[:, :4].set(words.hidden[:, 3::-1]))
    image = jax.random.normal(jax.random.key(4), (4, *SHAPES.image))
    assert float(jnp.abs(score(image, words) - score(image, turned)).min()) > 1e-4
    latent = jax.random.normal(jax.random.key(3), (4, 6))
    assert float(jnp.abs(draw(latent, words) - draw(latent, turned)).max()) > 1e-3


def test_an_even_picture_has_a_gradient_of_common_size():
    # Norms multiply the gradient by what is missing in size: near zero they would make the first penalties explode.
    family = Gan(network=SMALLEST)
    params = jax.jit(lambda: family.init(jax.random.key(0), SHAPES)["discriminator"], compiler_options=QUICK)()
    network = bind(family.build("discriminator", SHAPES), params)
    reading = network.read(text(1))
    slope = jax.jit(jax.grad(lambda x: network.judge(network.look(x), reading)[0]), compiler_options=QUICK)
    flat, busy = (jnp.linalg.norm(slope(x * jnp.ones((1, *SHAPES.image)))) for x in (0.0, jnp.linspace(-1, 1, 3)))
    assert float(flat) < 3 * float(busy)


def test_sampling_scales_the_noise_and_ignores_guidance():
    family = Gan(network=Plain())
    params, keys = random_params(family), jax.random.split(jax.random.key(6), 4)
    g = jax.tree.map(lambda p: np.asarray(p, np.float64), params["generator"])
    z = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys), np.float64)
    for temperature in (1.0, 0.5, 0.0):
        settings = dataclasses.replace(SETTINGS, temperature=temperature)
        drawn = family.sample(params, {}, text(), text(seed=1), keys, settings)
        expected = to_uint8(jnp.asarray(temperature * z @ g["w"] + g["v"]).reshape(4, *SHAPES.image))
        assert np.abs(np.asarray(drawn, int) - np.asarray(expected, int)).max() <= 1
    same = family.sample(params, {}, text(), text(seed=2), keys, dataclasses.replace(settings, guidance_scale=9.0))
    np.testing.assert_array_equal(drawn, same)


def test_a_walk_goes_round_a_circle_and_ends_at_the_picture():
    family = Gan(network=Plain())
    params, keys = random_params(family), jax.random.split(jax.random.key(6), 4)
    settings = dataclasses.replace(SETTINGS, temperature=0.5)
    frames = np.asarray(family.trace(params, {}, text(), text(), keys, settings, 8), int)
    assert frames.shape == (8, 4, *SHAPES.image)
    assert np.abs(frames[-1] - np.asarray(family.sample(params, {}, text(), text(), keys, settings), int)).max() <= 1
    # A linear generator's pictures lie on an ellipse: opposite ones have the middle between them.
    clipped = (frames <= 0) | (frames >= 255)
    level = (np.asarray(params["generator"]["v"]).reshape(SHAPES.image) + 1) * 127.5
    for k in range(4):
        middle = np.where(clipped[k] | clipped[k + 4], level, (frames[k] + frames[k + 4]) / 2)
        np.testing.assert_allclose(middle, np.broadcast_to(level, middle.shape), atol=1.01)
    assert (np.abs(np.diff(frames, axis=0)).mean((1, 2, 3, 4)) > 1).all()


def test_colour_follows_its_closed_form():
    image, key = jax.random.uniform(jax.random.key(0), (5, 4, 4, 3), minval=-1), jax.random.key(1)
    u = np.asarray(jax.random.uniform(jax.random.split(key, 3)[0], (3, 5, 1, 1, 1)), np.float64)
    x = np.asarray(image, np.float64) + u[0] - 0.5
    grey = x.mean(3, keepdims=True)
    x = grey + (x - grey) * 2 * u[1]
    mean = x.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(augment(image, key, ("colour",)), mean + (x - mean) * (0.5 + u[2]), atol=1e-6)


def test_translation_shifts_by_an_eighth_at_most_and_fills_with_zeros():
    image = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (300, 16, 16, 3)), jnp.float32)
    moved = np.asarray(augment(image, jax.random.key(0), ("translation",)))
    padded = np.pad(np.asarray(image), ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for one, source in zip(moved, padded, strict=True):
        fits = [(y, x) for y in range(5) for x in range(5) if np.abs(source[y : y + 16, x : x + 16] - one).max() < 1e-6]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 25


def test_a_square_of_half_the_side_is_cut_out_around_any_place():
    image = jnp.ones((2000, 16, 16, 2))
    holes = np.asarray(augment(image, jax.random.key(0), ("cutout",))) == 0
    assert (holes[..., 0] == holes[..., 1]).all()
    rows, columns = (holes[..., 0].any(axis) for axis in (2, 1))
    assert (holes[..., 0] == rows[:, :, None] & columns[:, None, :]).all()  # one rectangle
    lengths = np.unique(rows.sum(1))
    assert (lengths.min(), lengths.max()) == (4, 8)  # a centre on the border leaves half of it
    # A row is cut when the centre is within 4 of it: 8 of 17 places.
    np.testing.assert_allclose(rows.mean(0)[5:11], 8 / 17, atol=0.04)


def test_pictures_are_changed_each_by_itself_and_gradients_pass():
    image, kinds = jnp.ones((2, 16, 16, 3)) * jnp.linspace(0.1, 1, 3), ("colour", "translation", "cutout")
    key = jax.random.key(3)
    np.testing.assert_array_equal(augment(image, key, ()), image)
    changed = augment(image, key, kinds)
    assert float(jnp.abs(changed[0] - changed[1]).max()) > 0.05
    way = jax.random.normal(key, image.shape)
    jacobian = jax.jvp(lambda x: augment(x, key, kinds), (image,), (way,))[1]  # it is affine, so exact
    np.testing.assert_allclose(augment(image + way, key, kinds) - changed, jacobian, atol=1e-5)
    assert float(jnp.abs(jacobian).mean()) > 0.05


def test_the_discriminator_sees_augmented_pictures_only():
    family = Gan(network=Plain(), augment=("cutout",), mismatch=0.0, penalty_every=1)
    params, batch = random_params(family), plain_batch()
    params["discriminator"]["q"] = jnp.zeros(())
    params["discriminator"]["a"] = jnp.ones((PIXELS, 10))  # logits are sums of what is seen
    batch["image"], batch["text"] = jnp.ones_like(batch["image"]), dataclasses.replace(text(6), pooled=jnp.full((6, 10), 0.1))
    metrics = family.losses(params, {}, batch, jax.random.key(1))["discriminator"][1]
    assert PIXELS / 2 < float(metrics["real"]) < PIXELS - 1
    slope = jax.grad(lambda p: family.losses({**params, "generator": p}, {}, batch, jax.random.key(1))["generator"][0])
    assert float((slope(params["generator"])["v"] != 0).mean()) > 0.5


@pytest.mark.parametrize("name", ["residual", "dcgan"])
def test_flops_are_those_xla_counts(name):
    # Large enough that element-wise work, which XLA counts too, is a small share.
    network = {
        "residual": dataclasses.replace(SMALLEST, widths=(32,), seen_widths=(32,), judge_width=32, refiner=1),
        "dcgan": DCGAN(noise=8, width=8, text=16),
    }[name]
    shapes = Shapes((64, 64, 3) if name == "dcgan" else (32, 32, 3), 12, 10)
    family = Gan(network=network, penalty_every=1)
    params = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))
    batch = {"image": jnp.ones((4, *shapes.image)), "text": text(4)}
    drawing = jax.jit(lambda p, z, words: family._generate(p, z, words, shapes.image), compiler_options=QUICK)
    drawing = drawing.lower(params, jnp.ones((4, network.noise)), batch["text"]).cost_analysis()["flops"]
    most = {"residual": 1.05, "dcgan": 1.3}[name]  # XLA leaves out what padding multiplies: a third of it at 4 x 4
    assert 0.6 < 4 * family.flops(shapes, 6) / drawing < most

    def both(params, batch, key):
        value = lambda tree, group: family.losses({**params, group: tree}, {}, batch, key)[group][0]  # noqa: E731
        return [jax.grad(value)(params[group], group) for group in family.groups]

    training = jax.jit(both, compiler_options=QUICK).lower(params, batch, jax.random.key(0)).cost_analysis()["flops"]
    assert 0.6 < 4 * family.train_flops(shapes, 6) / training < most


def test_shares_of_the_work_follow_the_settings():
    shapes, p = Shapes((32, 32, 3), 384, 384), RESIDUAL.flops(Shapes((32, 32, 3), 384, 384), 24)
    work = lambda **change: Gan(network=RESIDUAL, **change).train_flops(shapes, 24)  # noqa: E731
    seen = p.look + p.judge
    assert work() - work(penalty_every=8) == pytest.approx(12 * seen / 8)
    assert work() - work(r2=0) == pytest.approx(6 * seen / 4)
    assert work() - work(mismatch=0) == pytest.approx(3 * p.judge)
    assert work() - work(loss="hinge") == pytest.approx(seen)


def test_mistakes_are_told():
    for family, message in (
        (Gan(r1=-1.0), "negative"),
        (Gan(penalty_every=0), "penalty_every=0"),
        (Gan(network=Residual(widths=(8,))), "one entry a level"),
        (Gan(network=Residual(seen_widths=(8,))), "seen_widths"),
        (Gan(network=Residual(judge_width=100)), "head_dim"),
        (Gan(network=Residual(noise=0)), "noise=0"),
        (Gan(network=DCGAN(width=0)), "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            config.finalize(family)
    with pytest.raises(UserError, match=r"data.image_size=30 is no multiple of 4"):
        Gan().init(jax.random.key(0), Shapes((30, 30, 3), 12, 10))
    with pytest.raises(UserError, match=r"data.image_size=24: family.network=dcgan"):
        Gan(network=DCGAN()).init(jax.random.key(0), Shapes((24, 24, 3), 12, 10))


@pytest.mark.parametrize("name", ["scenes_gan", "emoji_gan"])
def test_shipped_configurations_are_whole_and_fit_in_what_ships(name):
    run = config.load(f"configs/{name}.py")
    assert config.from_dict(RunConfig, config.to_dict(run)) == run
    shapes = Shapes((run.data.image_size, run.data.image_size, 3), 384, 384)
    generator = jax.eval_shape(lambda: run.family.init(jax.random.key(0), shapes))["generator"]
    assert sum(leaf.size for leaf in jax.tree.leaves(generator)) * 2 <= 4e6
    textbook = config.load(
        f"configs/{name}.py",
        ["family.network=dcgan", "family.loss=nonsaturating", "family.r1=0", "family.r2=0", "family.augment=cutout"],
    )
    assert textbook.family == dataclasses.replace(
        run.family, network=DCGAN(), loss="nonsaturating", r1=0.0, r2=0.0, augment=("cutout",)
    )
