"""The in-tree autoencoder: quantisation, losses and gradients against closed forms in float64, latents and tokens."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families.autoencoder import KL, Autoencoder, Convolutional, _fit
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.codec import Pretrained
from jaxgen.families.fsq import FSQ
from jaxgen.nn.module import flatten, unflatten

SHAPES = Shapes((16, 16, 3), 12, 10)
LEVELS = (8, 5, 3)
BOTTLENECKS = {"kl": KL(channels=3, weight=0.01), "fsq": FSQ(LEVELS)}
either = pytest.mark.parametrize("kind", BOTTLENECKS)


def network(kind):
    return Convolutional(widths=(8, 16), encoder_blocks=1, decoder_blocks=1, bottleneck=BOTTLENECKS[kind])


@functools.cache
def random_params(kind, adversarial=0.0):
    """Every weight random, also those that start at zero, so that nothing is invisible to a test."""
    family = Autoencoder(network=network(kind), adversarial=adversarial, discriminator_widths=(8, 8))
    rng = np.random.default_rng(0)

    def draw(leaf):
        spread = 0.2 if leaf.ndim == 1 else 1 / math.sqrt(math.prod(leaf.shape[:-1]))
        return jnp.asarray(rng.normal(size=leaf.shape) * spread, jnp.float32)

    params = {name: draw(leaf) for name, leaf in flatten(jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES)))}
    return unflatten({name: leaf + 1 if "norm" in name and name.endswith(".scale") else leaf for name, leaf in params.items()})


def pictures(count=8):
    return jax.random.uniform(jax.random.key(2), (count, *SHAPES.image), minval=-1, maxval=1)


# Quantisation


@pytest.mark.parametrize("levels", [3, 4, 5, 6, 7, 8, 9, 16])
def test_a_channel_has_its_levels_and_zero_is_one_of_them(levels):
    fsq = FSQ((levels,))
    codes = np.asarray(fsq.quantise(jnp.linspace(-12, 12, 4001)[:, None]))[:, 0]
    assert (np.diff(codes) >= 0).all()
    expected = (np.arange(levels) - levels // 2) / (levels // 2)
    np.testing.assert_allclose(np.unique(codes), expected, atol=1e-7)
    assert codes[2000] == 0.0
    assert float(fsq.bound(jnp.zeros(1))[0]) == pytest.approx(0.0, abs=1e-6)


def reference(x, levels):
    """(bounded, its derivative) float64, as arXiv 2309.15505 has it: tanh, moved by half a step where levels are even."""
    half, offset = (levels - 1) / 2 * 0.999, 0.5 * (levels % 2 == 0)
    moved = np.tanh(np.asarray(x, np.float64) + np.arctanh(offset / half))
    return moved * half - offset, half * (1 - moved**2)


def test_codes_are_rounded_and_the_gradient_is_that_of_the_bound():
    fsq = FSQ(LEVELS)
    x = 2.0 * jax.random.normal(jax.random.key(0), (50, 3))
    weight = jax.random.normal(jax.random.key(1), x.shape)
    codes = fsq.quantise(x)
    gradient = jax.grad(lambda x: jnp.sum(weight * fsq.quantise(x)))(x)
    for k, levels in enumerate(LEVELS):
        bounded, slope = reference(x[:, k], levels)
        np.testing.assert_allclose(codes[:, k], np.round(bounded) / (levels // 2), atol=1e-6)
        np.testing.assert_allclose(gradient[:, k], weight[:, k] * slope / (levels // 2), rtol=1e-4, atol=1e-6)


def test_tokens_number_all_codes_in_mixed_radix():
    fsq = FSQ(LEVELS)
    tokens = jnp.arange(fsq.vocab)
    assert fsq.vocab == 120
    codes = fsq.codes(tokens)
    assert len(np.unique(np.asarray(codes), axis=0)) == 120
    np.testing.assert_array_equal(fsq.tokens(codes), tokens)
    digits = np.array([6, 1, 2])  # 6 + 8 (1 + 5 * 2)
    np.testing.assert_allclose(fsq.codes(jnp.int32(94)), (digits - np.array([4, 2, 1])) / np.array([4, 2, 1]), atol=1e-7)
    np.testing.assert_array_equal(fsq.nearest(codes + 0.12), codes)  # less than half of the least step, 1/4
    np.testing.assert_array_equal(fsq.nearest(3.0 * jnp.sign(codes) + codes).max(0), codes.max(0))  # and none beyond the last
    mean, deviation = fsq.statistics
    np.testing.assert_allclose(mean, np.asarray(codes, np.float64).mean(0), atol=1e-6)
    np.testing.assert_allclose(deviation, np.asarray(codes, np.float64).std(0), rtol=1e-6)


# Losses


class Given:
    """A network whose results are its parameters."""

    def __init__(self, bottleneck):
        self.bottleneck = bottleneck

    def autoencode(self, params, image, key):
        return params["made"], {name: params[name] for name in ("mean", "log", "codes") if name in params}


class Scored(Autoencoder):
    """The discriminator's score of a picture is a multiple of its mean."""

    def _score(self, params, x):
        return params["w"] * jnp.mean(x, axis=(1, 2, 3))[:, None]


def given():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    generator = {"made": draw(4, 8, 8, 3), "mean": 2 * draw(4, 2, 2, 3) + 1, "log": draw(4, 2, 2, 3), "shift": draw(3)}
    return draw(4, 8, 8, 3), {"generator": generator | {"log_scale": draw(3)}, "discriminator": {"w": jnp.float32(0.7)}}


@pytest.mark.parametrize("kind", ["hinge", "nonsaturating"])
def test_losses_and_their_gradients_are_the_closed_forms(kind):
    family = Scored(network=Given(KL(3, weight=0.25)), l1=0.5, l2=2.0, adversarial=0.3, adversarial_loss=kind)
    image, params = given()
    wide = {name: np.asarray(value, np.float64) for name, value in params["generator"].items()}
    x, made, mean, log = np.asarray(image, np.float64), wide["made"], wide["mean"], wide["log"]
    w, error, count = 0.7, made - x, made.size
    real, fake = w * x.mean((1, 2, 3)), w * made.mean((1, 2, 3))
    of_mean = np.ones_like(x) / x[0].size  # of a picture's mean
    sigmoid, softplus = (lambda a: 1 / (1 + np.exp(-a))), lambda a: np.log1p(np.exp(a))
    if kind == "hinge":
        wish, slope = -fake, -np.ones(4)
        telling = np.maximum(1 - real, 0) + np.maximum(1 + fake, 0)
        by_w = ((fake > -1) * fake - (real < 1) * real) / w
    else:
        wish, slope = softplus(-fake), -sigmoid(-fake)
        telling = softplus(-real) + softplus(fake)
        by_w = (sigmoid(fake) * fake - sigmoid(-real) * real) / w
    # KL(N(mean, e^log) || N(0, 1)) by quadrature.
    z, dz = np.linspace(-30, 30, 20001, retstep=True)
    density = np.exp(-0.5 * (z - mean[..., None]) ** 2 / np.exp(log[..., None])) / np.sqrt(2 * np.pi * np.exp(log[..., None]))
    ratio = 0.5 * z**2 - 0.5 * (z - mean[..., None]) ** 2 / np.exp(log[..., None]) - 0.5 * log[..., None]
    nats = (density * ratio).sum() * dz / 4
    expected = 0.5 * np.abs(error).mean() + 2 * (error**2).mean() + 0.25 * nats / 192 + 0.3 * wish.mean()

    def loss(params, group):
        value, metrics = family.losses(params, {}, {"image": image}, jax.random.key(0))[group]
        return value, metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, "generator")
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_bits"], nats / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], (error**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / (error**2).mean()), rtol=1e-5)
    by_made = (0.5 * np.sign(error) + 2 * 2 * error) / count + 0.3 * slope[:, None, None, None] / 4 * w * of_mean
    gradient = gradient["generator"]
    np.testing.assert_allclose(gradient["made"], by_made, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(gradient["mean"], 0.25 * mean / 4 / 192, rtol=1e-5)
    np.testing.assert_allclose(gradient["log"], 0.25 * 0.5 * (np.exp(log) - 1) / 4 / 192, rtol=1e-4, atol=1e-9)
    # The statistics follow the batch's latents, and these do not feel it.
    variance = mean.var((0, 1, 2)) + np.exp(log).mean((0, 1, 2))
    np.testing.assert_allclose(gradient["shift"], 2 * (wide["shift"] - mean.mean((0, 1, 2))), rtol=1e-4)
    np.testing.assert_allclose(gradient["log_scale"], 2 * (wide["log_scale"] - 0.5 * np.log(variance)), rtol=1e-4)
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, "discriminator")
    np.testing.assert_allclose(value, telling.mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient["discriminator"]["w"], by_w.mean(), rtol=1e-4)
    np.testing.assert_allclose((metrics["real"], metrics["fake"]), (real.mean(), fake.mean()), rtol=1e-4)


def test_tokens_met_are_counted():
    fsq = FSQ((3, 3))
    tokens = jnp.array([[[0, 0], [4, 8]]])
    params = {"generator": {"made": jnp.zeros((1, 4, 4, 3)), "codes": fsq.codes(tokens)}}
    _, metrics = Autoencoder(network=Given(fsq)).losses(params, {}, {"image": jnp.ones((1, 4, 4, 3))}, jax.random.key(0))[
        "generator"
    ]
    assert float(metrics["token_share"]) == pytest.approx(3 / 9)
    assert float(metrics["token_perplexity"]) == pytest.approx(2**1.5)  # shares 1/2, 1/4, 1/4


def test_the_statistics_give_latents_of_zero_mean_and_unit_variance():
    mean = jnp.array([3.0, -1.0, 0.0]) + jnp.array([5.0, 0.1, 1.0]) * jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    log = jnp.full(mean.shape, -2.0)
    params = {"shift": jnp.zeros(3), "log_scale": jnp.zeros(3)}
    step = jax.jit(lambda p: jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(_fit)(p, mean, log)))
    for _ in range(60):
        params = step(params)
    shift, scale = np.asarray(params["shift"]), np.exp(params["log_scale"])
    latent = (np.asarray(mean) - shift) / scale
    np.testing.assert_allclose(latent.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose((latent**2).mean((0, 1, 2)) + np.exp(-2.0) / scale**2, 1, atol=1e-3)


# Latents and tokens


@functools.cache
def coded(kind):
    """What is made of pictures: "latent", a draw of it "drawn", the "tokens", what the encoder "found", the "roundtrip"; and of
    these "decoded" latents, those of latents "nearby", and decoded tokens "made"."""
    codec, params, image = network(kind), random_params(kind)["generator"], pictures()

    @jax.jit
    def run(params, image):
        out = {"latent": codec.encode(params, image), "drawn": codec.encode(params, image, jax.random.key(7))}
        out |= {"tokens": codec.tokenize(params, image)} if kind == "fsq" else {}
        out["found"] = codec._bind(params, 3).encoder(image)
        return out | {"roundtrip": Autoencoder(network=codec).roundtrip({"generator": params}, {}, image)}

    out, decode = run(params, image), jax.jit(codec.decode)
    out |= {"decoded": decode(params, out["latent"]), "nearby": decode(params, out["latent"] + 0.1)}
    return out | ({"made": jax.jit(codec.detokenize)(params, out["tokens"])} if kind == "fsq" else {})


@either
def test_latents_have_the_shape_that_is_said_and_decode_to_the_roundtrip(kind):
    latent, decoded = coded(kind)["latent"], coded(kind)["decoded"]
    codec = network(kind)
    assert latent.shape[1:] == codec.latent_shape(SHAPES.image) == (4, 4, 3)
    assert latent.dtype == decoded.dtype == jnp.float32
    np.testing.assert_allclose(decoded, coded(kind)["roundtrip"], atol=1e-5)
    assert decoded.shape[1:] == SHAPES.image


def test_continuous_latents_are_shifted_scaled_and_drawn():
    latent, drawn, params = coded("kl")["latent"], coded("kl")["drawn"], random_params("kl")["generator"]
    mean, log = np.split(np.asarray(coded("kl")["found"], np.float64), 2, axis=-1)
    shift, scale = np.asarray(params["shift"], np.float64), np.exp(np.asarray(params["log_scale"], np.float64))
    np.testing.assert_allclose(latent, (mean - shift) / scale, rtol=1e-4, atol=1e-5)
    noise = np.asarray(jax.random.normal(jax.random.key(7), latent.shape))
    np.testing.assert_allclose(drawn, (mean + np.exp(0.5 * log) * noise - shift) / scale, rtol=1e-4, atol=1e-5)


def test_tokens_are_the_latents():
    latent, drawn, tokens, decoded, made, nearby = (
        coded("fsq")[name] for name in ("latent", "drawn", "tokens", "decoded", "made", "nearby")
    )
    fsq = BOTTLENECKS["fsq"]
    assert tokens.dtype == jnp.int32
    assert tokens.shape == (8, 4, 4)
    assert 0 <= int(tokens.min()) < int(tokens.max()) < network("fsq").vocab == 120
    mean, deviation = fsq.statistics
    np.testing.assert_allclose(latent, (fsq.codes(tokens) - mean) / deviation, atol=1e-5)
    np.testing.assert_array_equal(latent, drawn)  # nothing is drawn
    np.testing.assert_allclose(made, decoded, atol=1e-5)
    np.testing.assert_allclose(nearby, decoded, atol=1e-5)  # what another family draws is rounded to codes


def test_a_discriminator_is_a_group_that_does_not_draw():
    plain, both = Autoencoder(), Autoencoder(adversarial=0.1)
    assert (plain.groups, both.groups, both.drawn) == (("generator",), ("generator", "discriminator"), ("generator",))


@either
def test_flops_are_those_xla_counts(kind):
    family, shapes = Autoencoder(network=dataclasses.replace(network(kind), widths=(16, 32))), Shapes((128, 128, 3), 0, 0)
    params = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))
    image = jax.ShapeDtypeStruct((1, *shapes.image), jnp.float32)
    cost = jax.jit(lambda p, x: family.roundtrip(p, {}, x)).lower(params, image).cost_analysis()
    # XLA leaves out what padding multiplies, and counts element-wise work.
    assert 0.75 < family.flops(shapes, 6) / cost["flops"] < 1.02


# Mistakes


def test_what_does_not_fit_is_told():
    refused = [
        (lambda: FSQ((8, 2)).validate(), "bottleneck.levels"),
        (lambda: FSQ(()).validate(), "bottleneck.levels"),
        (lambda: FSQ((64,) * 6).validate(), "more than int32"),
        (lambda: KL(channels=0).validate(), "channels=0"),
        (lambda: Convolutional(widths=()).validate(), "widths"),
        (lambda: Convolutional(decoder_blocks=-1).validate(), "decoder_blocks"),
        (lambda: Autoencoder(l1=0.0, l2=0.0).validate(), "family.l1"),
        (lambda: Autoencoder(discriminator_widths=()).validate(), "discriminator_widths"),
        (lambda: Autoencoder().init(jax.random.key(0), Shapes((30, 30, 3), 1, 1)), "data.image_size=30 is no multiple of 4"),
        (
            lambda: Autoencoder(adversarial=0.1, discriminator_widths=(8,) * 4).init(
                jax.random.key(0), Shapes((24, 24, 3), 1, 1)
            ),
            "data.image_size=24 is no multiple of 16",
        ),
        (lambda: Convolutional(bottleneck=KL()).vocab, "continuous latents"),
        (lambda: Pretrained(codec=Convolutional(bottleneck=KL())).vocab, "continuous latents"),
        (lambda: Pretrained().validate(), "family.codec.source is empty"),
        (lambda: Pretrained("/nowhere/at/all").resolve(), "no such directory"),
        (lambda: Pretrained("flow").resolve(), "a model of the family flow, not an autoencoder"),
        (lambda: Autoencoder().sample({}, {}, None, None, None, SampleSettings(SHAPES.image)), "draws nothing from text"),
    ]
    for call, message in refused:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_sections_are_chosen_by_name_and_survive_json():
    chosen = configs.apply_overrides(
        Autoencoder(), ["network.bottleneck=fsq", "network.bottleneck.levels=7,7,7", "network.widths=8,16", "l2=0.5"]
    )
    assert chosen == Autoencoder(network=Convolutional(widths=(8, 16), bottleneck=FSQ((7, 7, 7))), l2=0.5)
    resolved = Pretrained("somewhere", chosen.network)
    assert configs.from_dict(Pretrained, configs.to_dict(resolved)) == resolved
    assert math.prod(resolved.codec.bottleneck.levels) == resolved.vocab == 343
