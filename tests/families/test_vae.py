import dataclasses
import functools
import math
from decimal import Decimal, getcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families.base import SampleSettings, Shapes
from jaxgen.families.vae import START, Vae, discretised_logistic, divergence, gaussian
from jaxgen.families.vae_networks import Gaussian, Ladder
from jaxgen.text.features import TextFeatures

SHAPES = Shapes((8, 8, 3), 12, 10)
DIMS = 8 * 8 * 3
LADDER = Ladder(
    strides=(2, 4),
    widths=(8, 16),
    down=(1, 1),
    up=(1, 2),
    groups=(1, 2),
    channels=2,
    attention=("joint", "text"),
    head_dim=8,
)
VAE = Vae(network=LADDER)
SETTINGS = SampleSettings(image=SHAPES.image, guidance_scale=1.0)


def text(batch=4, tokens=6, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, tokens, 12)).astype(np.float32)
    pooled = rng.normal(size=(batch, 10)).astype(np.float32)
    return TextFeatures(jnp.asarray(hidden), jnp.asarray(pooled), jnp.asarray(np.arange(tokens) < 4)[None].repeat(batch, 0))


def levels(count=4, seed=0):
    """Pictures of whole levels, some of them the first and the last."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, (count, *SHAPES.image)) / 127.5 - 1, jnp.float32)


BATCH = {"image": levels(), "text": text()}


def random_params(family, scale=0.2):
    """Every weight random, also those that start at zero, so that nothing is invisible to a test."""
    params = family.init(jax.random.key(0), SHAPES)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(tree, [p + scale * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)])


PARAMS = random_params(VAE)


def score(family, params, batch, key):
    return jax.value_and_grad(lambda p: family.losses(p, {}, batch, key)["generator"], has_aux=True)(params)


gradient = jax.jit(functools.partial(score, VAE))


@jax.jit
def look(params, words, image):
    """(mean and log scale of the likelihood, [(prior, posterior) of each group]); every latent is its prior's mean."""
    seen = []

    def draw(k, prior, posterior):
        assert k == len(seen)
        seen.append((prior, posterior))
        return prior.mean

    return VAE._run(params, SHAPES.image, words, draw, image), seen


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A network of two groups of one latent, whose numbers are its parameters; the picture is the sum of both latents.

    prior and posterior are [group][mean, log scale]; the prior's means are `null` where the pooled text is negative."""

    top_groups = 1

    def check_image(self, image):
        pass

    def build(self, rngs, shapes, out, learned_prior):
        class Network(nnx.Module):
            def __init__(self):
                for name in ("prior", "posterior"):
                    setattr(self, name, nnx.Param(jnp.zeros((2, 2)), axes=(None, None)))
                self.null = nnx.Param(jnp.zeros(2), axes=(None,))
                self.shift = nnx.Param(jnp.zeros(()), axes=())

            def __call__(self, words, draw, image=None):
                batch, total = len(words.pooled), self.shift[...]
                spread = lambda x: jnp.broadcast_to(x, (batch, 1, 1, 1))  # noqa: E731
                for k in range(2):
                    mean = jnp.where(words.pooled[:, :1, None, None] > 0, self.prior[...][k, 0], self.null[...][k])
                    prior = Gaussian(mean, spread(self.prior[...][k, 1]))
                    posterior = None if image is None else Gaussian(*map(spread, self.posterior[...][k]))
                    total = total + draw(k, prior, posterior)
                return jnp.broadcast_to(total, (batch, *shapes.image))

        return Network()


def oracle(prior=((0, 0), (0, 0)), posterior=((0, 0), (0, 0)), null=(0, 0), log_scale=0.0, shift=0.0):
    params = {"prior": prior, "posterior": posterior, "null": null, "log_scale": [log_scale - START] * 3, "shift": shift}
    return {"generator": {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}}


def yes(batch=1, sign=1.0):
    return dataclasses.replace(text(batch), pooled=sign * jnp.ones((batch, 10)))


# Divergence and likelihoods


def test_the_divergence_is_the_closed_form_and_the_mean_log_ratio():
    rng = np.random.default_rng(0)
    m, s, n, r = rng.normal(size=4)[:, None, None, None, None] * rng.normal(size=(4, 3, 2, 2, 5))
    found = divergence(Gaussian(*jnp.asarray([m, s], jnp.float32)), Gaussian(*jnp.asarray([n, r], jnp.float32)))
    closed = r - s + (np.exp(2 * s) + (m - n) ** 2) / (2 * np.exp(2 * r)) - 0.5
    np.testing.assert_allclose(found, closed.sum((1, 2, 3)), rtol=1e-5)
    z = m + np.exp(s) * rng.normal(size=(20_000, *m.shape))
    ratio = -s - 0.5 * ((z - m) / np.exp(s)) ** 2 + r + 0.5 * ((z - n) / np.exp(r)) ** 2
    each = ratio.sum((2, 3, 4))
    assert (np.abs(each.mean(0) - found) < 4 * each.std(0) / math.sqrt(len(z))).all()
    assert (np.asarray(found) > 0).all()


def test_the_discretised_logistic_is_a_distribution_over_256_levels():
    x = jnp.arange(256)[:, None, None] / 127.5 - 1
    mean, log_scale = jnp.asarray([-1.7, -1.0, -0.3, 0.0, 0.999, 1.3])[:, None], jnp.asarray([-6.5, -3.0, -1.0, 1.0])
    np.testing.assert_allclose(jnp.exp(discretised_logistic(x, mean, log_scale)).sum(0), 1.0, rtol=2e-4)


def test_the_discretised_logistic_is_exact_far_out_and_has_finite_gradients():
    getcontext().prec = 120  # 1 - exp(-171) must not be 1
    values = [(0, 0.9, -4.5), (255, -0.9, -4.5), (1, 0.9, -4.5), (254, -0.9, -4.5), (128, 0.0039, -6.9), (77, 0.2, -3.0)]
    values += [(0, -1.0, -2.0), (255, 0.0, 3.0), (100, 5.0, 4.0), (3, 1.0, -4.0)]
    u, mean, log_scale = (np.asarray(v) for v in zip(*values, strict=True))
    x, mean, log_scale = (np.float32(v) for v in (u / 127.5 - 1, mean, log_scale))

    def reference(i):
        cdf = lambda v: 1 / (1 + (-(v - Decimal(float(mean[i]))) / Decimal(float(log_scale[i])).exp()).exp())  # noqa: E731
        centre, half = Decimal(float(x[i])), Decimal(1) / 255
        upper = Decimal(1) if u[i] == 255 else cdf(centre + half)
        return float((upper - (Decimal(0) if u[i] == 0 else cdf(centre - half))).ln())

    found = discretised_logistic(*map(jnp.asarray, (x, mean, log_scale)))
    np.testing.assert_allclose(found, [reference(i) for i in range(len(u))], rtol=2e-5, atol=2e-5)
    slopes = jax.grad(lambda m, s: discretised_logistic(x, m, s).sum(), argnums=(0, 1))
    for narrower in (0.0, 2.4):
        assert all(np.isfinite(slope).all() for slope in slopes(mean, log_scale - narrower))
    # Far from the mean the slope is that of exp(-|x - mean| / scale), not zero.
    np.testing.assert_allclose(slopes(mean, log_scale)[0][:2] * np.exp(log_scale[:2]), [-1.0, 1.0], rtol=1e-5)


def test_the_gaussian_is_a_density_times_a_level():
    x, mean, scale = np.linspace(-1, 1, 5), 0.2, 0.3
    density = np.exp(-((x - mean) ** 2) / (2 * scale**2)) / (scale * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(gaussian(jnp.asarray(x), mean, math.log(scale)), np.log(density * 2 / 255), rtol=1e-5)


# The bound


@pytest.mark.parametrize("likelihood", ["discretised_logistic", "gaussian"])
def test_bits_of_a_case_made_by_hand(likelihood):
    family = Vae(network=Oracle(), likelihood=likelihood)
    prior, posterior = np.array([(0.5, 0.2), (-0.1, -0.4)]), np.array([(0.2, -0.3), (-0.3, -1.0)])
    params, key = oracle(prior, posterior, log_scale=-1.5), jax.random.key(3)
    batch = {"image": levels(), "text": yes(4)}
    loss, metrics = family.losses(params, {}, batch, key)["generator"]
    eps = [np.asarray(jax.random.normal(jax.random.fold_in(key, k), (4, 1, 1, 1)), np.float64) for k in range(2)]
    mean = sum(m + np.exp(s) * e for (m, s), e in zip(posterior, eps, strict=True))
    x, scale = np.asarray(batch["image"], np.float64), math.exp(-1.5)
    if likelihood == "gaussian":
        log_p = np.log(2 / 255) - np.log(scale * math.sqrt(2 * math.pi)) - (x - mean) ** 2 / (2 * scale**2)
    else:
        cdf = lambda v: 1 / (1 + np.exp(-(v - mean) / scale))  # noqa: E731
        upper, lower = np.where(x > 0.999, 1.0, cdf(x + 1 / 255)), np.where(x < -0.999, 0.0, cdf(x - 1 / 255))
        log_p = np.log(upper - lower)
    reconstruction = -log_p.mean() / math.log(2)
    (m, s), (n, r) = posterior.T, prior.T
    kl = (r - s + (np.exp(2 * s) + (m - n) ** 2) / (2 * np.exp(2 * r)) - 0.5) / math.log(2)
    np.testing.assert_allclose(metrics["bits_per_dim_reconstruction"], reconstruction, rtol=1e-5)
    np.testing.assert_allclose([metrics["kl_1"], metrics["kl_2"]], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_dim_kl"], kl.sum() / DIMS, rtol=1e-5)
    np.testing.assert_allclose(metrics["bits_per_dim"], reconstruction + kl.sum() / DIMS, rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], np.mean((x - mean) ** 2), rtol=1e-5)
    np.testing.assert_allclose(loss, metrics["bits_per_dim"], rtol=1e-6)
    heavy, _ = dataclasses.replace(family, kl_weight=5.0).losses(params, {}, batch, key)["generator"]
    np.testing.assert_allclose(heavy, reconstruction + 5 * kl.sum() / DIMS, rtol=1e-5)


def slopes(family, params):
    batch = {"image": levels(), "text": yes(4)}
    return score(family, params, batch, jax.random.key(3))


def test_free_bits_are_free_and_no_more():
    params = oracle(posterior=((0.5, 0.1), (3.0, -0.2)))  # 0.2 and 6.5 bits
    (plain, metrics), whole = slopes(Vae(network=Oracle()), params)
    (loss, same), part = slopes(Vae(network=Oracle(), free_bits=1.0), params)
    (_, _), none = slopes(Vae(network=Oracle(), kl_weight=0.0), params)
    whole, part, none = (g["generator"] for g in (whole, part, none))
    assert metrics["kl_1"] < 1.0 < metrics["kl_2"]
    assert same == metrics  # what is reported is what there is
    np.testing.assert_allclose(loss, plain + (1.0 - metrics["kl_1"]) / DIMS, rtol=1e-6)
    for name in ("prior", "posterior"):
        np.testing.assert_array_equal(part[name][0], none[name][0])  # no pull on the first group
        np.testing.assert_allclose(part[name][1], whole[name][1], rtol=1e-6)
        assert float(jnp.abs(whole[name] - none[name]).min()) > 1e-4


def test_the_balance_of_the_divergence_is_the_posteriors_alone():
    params = oracle(prior=((0.5, 0.2), (0, 0)), posterior=((1.5, -0.3), (0, 0)))
    (plain, _), whole = slopes(Vae(network=Oracle()), params)
    (_, _), none = slopes(Vae(network=Oracle(), kl_weight=0.0), params)
    (loss, _), part = slopes(Vae(network=Oracle(), kl_to_posterior=0.25), params)
    whole, part, none = (g["generator"] for g in (whole, part, none))
    np.testing.assert_allclose(loss, plain, rtol=1e-6)
    np.testing.assert_allclose(part["prior"], whole["prior"], rtol=1e-6)
    np.testing.assert_allclose(
        part["posterior"] - none["posterior"], 0.25 * (whole["posterior"] - none["posterior"]), atol=1e-7
    )
    n, r, m, s = 0.5, 0.2, 1.5, -0.3  # and the whole one is the closed form's
    np.testing.assert_allclose(
        (whole["prior"] - none["prior"])[0] * DIMS * math.log(2),
        [(n - m) * math.exp(-2 * r), 1 - (math.exp(2 * s) + (m - n) ** 2) * math.exp(-2 * r)],
        rtol=1e-4,
    )


def test_a_least_scale_softens_what_the_mean_learns_and_not_the_scale():
    params = oracle(log_scale=-3.0, shift=0.1)
    (_, bits), sharp = slopes(Vae(network=Oracle()), params)
    (loss, same), soft = slopes(Vae(network=Oracle(), loss_min_scale=0.3), params)
    (wide, _), expected = slopes(Vae(network=Oracle()), oracle(log_scale=math.log(0.3), shift=0.1))
    assert same == bits
    np.testing.assert_allclose(loss, wide, rtol=1e-6)
    np.testing.assert_allclose(soft["generator"]["shift"], expected["generator"]["shift"], rtol=1e-5)
    np.testing.assert_allclose(soft["generator"]["log_scale"], sharp["generator"]["log_scale"], rtol=1e-6)
    (_, _), unused = slopes(Vae(network=Oracle(), loss_min_scale=0.01), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), unused, sharp)


def test_the_gradient_is_that_of_float64(monkeypatch):
    (loss, metrics), grads = gradient(PARAMS, BATCH, jax.random.key(5))
    normal = jax.random.normal
    with jax.enable_x64(True), monkeypatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        patch.setattr(jax.random, "normal", lambda key, shape: normal(key, shape, np.float32).astype(np.float64))
        params, batch = jax.tree.map(lambda a: a if a.dtype == bool else np.asarray(a, np.float64), (PARAMS, BATCH))
        (exact, exact_metrics), wide = jax.jit(functools.partial(score, VAE))(params, batch, jax.random.key(5))
        assert {leaf.dtype for leaf in jax.tree.leaves((exact, wide))} == {np.dtype("float64")}
        exact, exact_metrics, wide = jax.device_get((exact, exact_metrics, wide))
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, exact_metrics)
    largest = max(np.abs(b).max() for b in jax.tree.leaves(wide))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * largest), grads, wide)
    # The prior's mean moves the posterior along, so the bound alone does not pull on it: everything else is seen.
    assert all(np.abs(b).max() > 0 for b in jax.tree.leaves(wide))


# The ladder


def test_a_posterior_starts_as_its_prior_and_follows_where_that_goes():
    (_, metrics), _ = gradient(VAE.init(jax.random.key(0), SHAPES), BATCH, jax.random.key(5))
    assert [float(metrics[f"kl_{k}"]) for k in (1, 2, 3)] == [0.0, 0.0, 0.0]
    _, seen = look(PARAMS, BATCH["text"], BATCH["image"])
    assert [prior.mean.shape[1:] for prior, _ in seen] == [(1, 1, 2), (1, 1, 2), (4, 4, 2)]
    moved = jax.tree.map(jnp.copy, PARAMS)
    moved["generator"]["latents"]["1"]["0"]["prior"]["bias"] += 0.7
    _, other = look(moved, BATCH["text"], BATCH["image"])
    np.testing.assert_allclose(other[0][0].mean - seen[0][0].mean, 0.7, rtol=1e-5)
    np.testing.assert_allclose(other[0][1].mean - seen[0][1].mean, 0.7, rtol=1e-5)
    assert float(jnp.abs(other[1][0].mean - seen[1][0].mean).max()) > 1e-3  # the groups below know of it
    assert float(jnp.abs(other[2][0].mean - seen[2][0].mean).max()) > 1e-3


def test_text_reaches_every_prior_token_by_token_and_padding_none():
    words, image = BATCH["text"], BATCH["image"]
    (mean, _), seen = look(PARAMS, words, image)
    padding = dataclasses.replace(words, hidden=words.hidden.at[:, 4:].add(9.0))
    np.testing.assert_allclose(mean, look(PARAMS, padding, image)[0][0], atol=1e-6)
    swapped = dataclasses.replace(words, hidden=words.hidden[:, jnp.asarray([1, 0, 2, 3, 4, 5])])  # the same bag of tokens
    pooled = dataclasses.replace(words, pooled=words.pooled + 1.0)
    for other in (swapped, pooled):
        (other_mean, _), priors = look(PARAMS, other, image)
        assert all(float(jnp.abs(a.mean - b.mean).max()) > 1e-4 for (a, _), (b, _) in zip(seen, priors, strict=True))
        assert float(jnp.abs(mean - other_mean).max()) > 1e-3


def test_the_picture_reaches_the_posteriors_alone():
    (mean, _), seen = look(PARAMS, BATCH["text"], BATCH["image"])
    (other_mean, _), other = look(PARAMS, BATCH["text"], levels(seed=1))
    np.testing.assert_array_equal(mean, other_mean)
    for (prior, posterior), (other_prior, other_posterior) in zip(seen, other, strict=True):
        np.testing.assert_array_equal(prior.mean, other_prior.mean)
        assert float(jnp.abs(posterior.mean - other_posterior.mean).max()) > 1e-3
        assert float(jnp.abs(posterior.log_scale - other_posterior.log_scale).max()) > 1e-4


def test_the_textbooks_is_a_field_away():
    family = Vae(network=dataclasses.replace(LADDER, up=(1, 1), groups=(0, 1), attention=("none", "none")), prior="standard")
    params = random_params(family)
    assert "prior" not in params["generator"]["latents"]["1"]["0"]

    @jax.jit
    def look(params):
        seen = []

        def draw(k, prior, posterior):
            seen.append(prior)
            return posterior.mean

        family._run(params, SHAPES.image, text(), draw, levels())
        return seen

    (prior,) = look(params)
    np.testing.assert_array_equal(jnp.stack(prior), jnp.zeros((2, 4, 1, 1, 2)))


def test_a_scale_of_each_pixel():
    family = dataclasses.replace(VAE, scale="pixel")
    params = family.init(jax.random.key(0), SHAPES)
    assert "log_scale" not in params["generator"]
    params["generator"]["head"]["bias"] = jnp.tile(jnp.asarray([0.1, 0.2, 0.3, -1.0, 0.5, -90.0]), 4)  # of 2 x 2 pixels
    mean, log_scale = jax.jit(lambda params: family._run(params, SHAPES.image, text(), lambda k, prior, _: prior.mean))(params)
    np.testing.assert_allclose(mean, np.broadcast_to(np.float32([0.1, 0.2, 0.3]), (4, 8, 8, 3)), rtol=1e-6)
    np.testing.assert_allclose(log_scale[2, 3, 4], [START - 1.0, START + 0.5, math.log(1e-3)], rtol=1e-6)


def test_training_learns_to_reconstruct_and_tells_what_each_group_holds():
    params, optimizer = VAE.init(jax.random.key(0), SHAPES), optax.adam(1e-2)
    image = jnp.broadcast_to(jnp.asarray([-0.8, -0.3, 0.4, 0.9])[:, None, None, None], (4, *SHAPES.image))
    words = jax.tree.map(lambda a: jnp.repeat(a[:1], 4, axis=0), text())  # the text does not tell them apart
    batch, state, history = {"image": image, "text": words}, optimizer.init(params), []

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    for step in range(150):
        (_, metrics), grads = gradient(params, batch, jax.random.key(step))
        params, state = update(params, state, grads)
        history.append(jax.device_get(metrics))
    assert history[-1]["mse"] < 0.02 * history[0]["mse"]
    assert sum(history[-1][f"kl_{k}"] for k in (1, 2, 3)) > 2.0  # one of four is two bits
    both = jax.jit(lambda key: VAE.reconstruct(params, {}, image, words, key))
    means, drawn = both(None), both(jax.random.split(jax.random.key(9), 4))
    assert float(jnp.abs(means - image).max()) < 0.2
    assert float(jnp.abs(drawn - means).max()) > 0.0
    assert float(jnp.abs(drawn - image).mean()) < 0.2


# Drawing


def picture(total):
    return np.round((np.clip(total, -1, 1) + 1) * 127.5)


def draw(params, batch=1, seed=0, null=None, method="sample", **change):
    keys = jax.random.split(jax.random.key(seed), batch)
    settings = dataclasses.replace(SETTINGS, **{k: v for k, v in change.items() if k != "frames"})
    rest = (change["frames"],) if "frames" in change else ()
    family = Vae(network=Oracle())
    return np.asarray(getattr(family, method)(params, {}, yes(batch), null or yes(batch, -1.0), keys, settings, *rest), float)


def noises(batch=1, seed=0):
    """float64 [2, B]: what each group draws for each picture."""
    keys = jax.random.split(jax.random.key(seed), batch)
    return np.array(
        [[float(jax.random.normal(jax.random.fold_in(key, k), (1, 1, 1))[0, 0, 0]) for key in keys] for k in (0, 1)]
    )


def test_guidance_moves_every_priors_mean_and_leaves_its_scale():
    params = oracle(prior=((0.3, -2.0), (-0.1, -1.5)), null=(0.1, -0.2))
    eps = noises(3)
    for scale in (1.0, 0.0, 2.5):
        means = np.array([0.1, -0.2]) + scale * (np.array([0.3, -0.1]) - np.array([0.1, -0.2]))
        total = means.sum() + 0.7 * (np.exp([-2.0, -1.5]) @ eps)
        found = draw(params, 3, guidance_scale=scale, temperature=0.7)
        assert np.abs(found - picture(total)[:, None, None, None]).max() <= 1
    same = draw(params, 3, guidance_scale=1.0, null=yes(3))
    np.testing.assert_array_equal(draw(params, 3, guidance_scale=1.0), same)  # the null caption is not looked at


def test_the_walk_goes_round_through_the_top_latent_and_ends_at_the_picture():
    params = oracle(prior=((0.1, -1.5), (0.0, -2.0)))
    frames = draw(params, 2, method="trace", frames=4)
    np.testing.assert_array_equal(frames[-1], draw(params, 2))
    top, below = np.exp([-1.5, -2.0])[:, None] * noises(2)
    opposite = picture(0.1 - top + below)  # half way round; what lies below is kept
    assert np.abs(frames[1] - opposite[:, None, None, None]).max() <= 1
    assert np.abs(frames[0] + frames[2] - 2 * picture(0.1 + below)[:, None, None, None]).max() <= 2
    np.testing.assert_array_equal(draw(params, 2, method="trace", frames=1)[0], draw(params, 2))
    assert LADDER.top_groups == 2
    assert dataclasses.replace(LADDER, groups=(1, 0, 0)).top_groups == 1


def test_a_reconstruction_is_what_the_posterior_says():
    params = oracle(prior=((5.0, 0.0), (5.0, 0.0)), posterior=((0.3, -2.0), (-0.1, -1.5)))
    family, keys = Vae(network=Oracle()), jax.random.split(jax.random.key(0), 3)
    np.testing.assert_allclose(family.reconstruct(params, {}, levels(3), yes(3)), 0.2, rtol=1e-6)
    total = 0.2 + np.exp([-2.0, -1.5]) @ noises(3)
    found = family.reconstruct(params, {}, levels(3), yes(3), keys)
    np.testing.assert_allclose(found, np.broadcast_to(total[:, None, None, None], (3, *SHAPES.image)), rtol=1e-5)


# Configuration


def test_what_does_not_fit_is_told():
    with pytest.raises(UserError, match=r"data.image_size=12 is no multiple of 8, .*strides=\(2, 4\)"):
        VAE.init(jax.random.key(0), Shapes((12, 12, 3), 12, 10))
    with pytest.raises(UserError, match="one entry a level"):
        Ladder(widths=(8,)).validate()
    with pytest.raises(UserError, match=r"groups=\(0, 0, 0, 3\): one at least, and on no level more"):
        Ladder(groups=(0, 0, 0, 3)).validate()
    with pytest.raises(UserError, match=r"groups=\(0, 0, 0, 0\)"):
        Ladder(groups=(0, 0, 0, 0)).validate()
    with pytest.raises(UserError, match="width 48 must be a multiple of head_dim=32"):
        Ladder(widths=(64, 48, 96, 128)).validate()
    with pytest.raises(UserError, match="channels=0"):
        Ladder(channels=0).validate()
    with pytest.raises(UserError, match=r"family.free_bits=-1 cannot be negative"):
        Vae(free_bits=-1).validate()


def test_the_section_is_read_as_it_is_written():
    assert configs.finalize(configs.from_dict(Vae, configs.to_dict(VAE))) == VAE
    changed = configs.apply_overrides(Vae(), ["likelihood=gaussian", "network.groups=0,0,0,1", "prior=standard"])
    assert (changed.likelihood, changed.network.groups, changed.prior) == ("gaussian", (0, 0, 0, 1), "standard")


def test_flops_are_those_xla_counts():
    # Large and wide, as XLA leaves out what padding multiplies and counts element-wise work.
    network = dataclasses.replace(LADDER, widths=(16, 32), strides=(4, 8), head_dim=16)
    family, shapes = Vae(network=network), Shapes((64, 64, 3), 12, 10)
    params = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))
    image = jax.ShapeDtypeStruct((1, *shapes.image), jnp.float32)

    def count(image):
        run = lambda params, image: family._run(params, shapes.image, text(1), lambda k, p, q: (q or p).mean, image)[0]  # noqa: E731
        return jax.jit(run).lower(params, image).cost_analysis()["flops"]

    assert 0.6 < family.flops(shapes, 6) / count(None) < 1.05
    assert 0.6 < family.train_flops(shapes, 6) / 3 / count(image) < 1.05
