import dataclasses
import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import config as configs
from jaxgen.errors import UserError
from jaxgen.families.autoregressive import Autoregressive, draw_mask, masked_after
from jaxgen.families.base import SampleSettings, Shapes, to_uint8
from jaxgen.families.codec import Codec, Pretrained, TokenCodec
from jaxgen.families.palette import Palette
from jaxgen.families.transformer import TokenTransformer
from jaxgen.nn.module import flatten, unflatten
from jaxgen.text.features import TextFeatures

IMAGE = (4, 6, 3)  # 2 x 3 tokens of 3
SHAPES = Shapes(IMAGE, 6, 5)
NETWORK = TokenTransformer(width=8, depth=2, head_dim=4, mlp_ratio=2)
FROZEN = {"codec": {"scale": jnp.float32(1.0)}}


@dataclass(frozen=True)
class Thirds(TokenCodec):
    """The level, of three, of every 2 x 2 pixels; its one parameter must come along."""

    vocab = 3

    def check_image(self, image):
        if image[0] % 2 or image[1] % 2:
            raise UserError("odd")

    def latent_shape(self, image):
        return image[0] // 2, image[1] // 2, 1

    def init(self, key, image):
        return {"scale": jnp.ones(())}

    def tokenize(self, params, image):
        return jnp.round(params["scale"] * image[:, ::2, ::2, 0] + 1.0).astype(jnp.int32)

    def detokenize(self, params, tokens):
        level = (tokens / params["scale"] - 1.0).astype(jnp.float32)
        return jnp.broadcast_to(
            level.repeat(2, 1).repeat(2, 2)[..., None], (*tokens.shape[:1], *2 * np.array(tokens.shape[1:]), 3)
        )


FAMILY = Autoregressive(codec=Pretrained(codec=Thirds()), network=NETWORK)
MASKED = dataclasses.replace(FAMILY, order="masked")
WHOLE = ("num_steps", "top_k")


def text(batch=4, tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, tokens, 6)).astype(np.float32)
    pooled = rng.normal(size=(batch, 5)).astype(np.float32)
    return TextFeatures(jnp.asarray(hidden), jnp.asarray(pooled), jnp.asarray(np.arange(tokens) < 3)[None].repeat(batch, 0))


@functools.cache
def random_params(family=FAMILY, shapes=SHAPES):
    """Every weight random, also those that start at zero, so that nothing is invisible to a test."""
    rng = np.random.default_rng(1)
    like = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.8 / math.sqrt(max(s.shape[0], 3)), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, like)


def random_tokens(batch=4, seed=3):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 3, (batch, 2, 3)), jnp.int32)


@functools.cache
def jitted(family, name):
    return jax.jit(getattr(family, name), static_argnums=1 if name == "_logits" else ())


def logits_of(inputs, words, family=FAMILY):
    return jitted(family, "_logits")(random_params(), (2, 3), inputs, words)


def settings(image=IMAGE, **change):
    """Arrays of always the same types, so that one program draws them all."""
    values = {f.name: f.default for f in dataclasses.fields(SampleSettings) if f.name not in ("image", "sampler")}
    values |= {"num_steps": 3, "guidance_scale": 1.0} | change
    arrays = {k: jnp.asarray(v, jnp.int32 if k in WHOLE else jnp.float32) for k, v in values.items()}
    return SampleSettings(image, "raster", **arrays)


def draw(family=FAMILY, words=None, null=None, keys=None, seed=0, **change):
    words, null = text() if words is None else words, text(seed=9) if null is None else null
    keys = jax.random.split(jax.random.key(seed), 4) if keys is None else keys
    return jitted(family, "draw")(random_params(), words, null, keys, settings(**change))


class Compiled(Autoregressive):
    """Draws by the program of the tests above."""

    def draw(self, params, text, null_text, key, settings):
        plain = Autoregressive(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return jitted(plain, "draw")(params, text, null_text, key, settings)


# --- A reference in float64 -------------------------------------------------------------------------------------------


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def rms(x, scale=1.0):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def mlp(p, x):
    h = linear(p["up"], x)
    return linear(p["down"], 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))))


def embed(p, x):
    return linear(p["second"], silu(linear(p["first"], x)))


def attention(p, x, seen, angles):
    """x [B, T, D], seen bool [B, T, T], angles [T, d/2]."""

    def project(kernel, norm=None):
        y = np.einsum("btd,dhk->bhtk", x, kernel)
        if norm is None:
            return y
        y = rms(y, norm["scale"])
        a, b = np.split(y, 2, axis=-1)
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], axis=-1)

    q, k, v = project(p["q"], p["q_norm"]), project(p["k"], p["k_norm"]), project(p["v"])
    logits = np.where(seen[:, None], np.einsum("bhtk,bhsk->bhts", q, k) / math.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhtk,hkd->btd", np.einsum("bhts,bhsk->bhtk", weights / weights.sum(-1, keepdims=True), v), p["out"])


def reference(params, inputs, words, causal):
    """Logits float64 [B, 6, 3] of a network of width 8, depth 2, head_dim 4 over a grid of 2 x 3."""
    p, c = params["generator"], params["generator"]["conditioning"]
    hidden, pooled, mask = (np.asarray(a, bool if a.dtype == bool else np.float64) for a in jax.tree.leaves(words))
    vector = silu(embed(c["pooled"], rms(pooled)))
    x, t = linear(c["tokens"], rms(hidden)), hidden.shape[1]
    for block in c["blocks"].values():
        angles = np.arange(t)[:, None] * 10_000.0 ** (-np.arange(4) / 4)
        seen = np.broadcast_to(mask[:, None], (len(x), t, t))
        x = x + attention(block["attention"], rms(x, block["norm1"]["scale"]), seen, angles)
        x = x + mlp(block["mlp"], rms(x, block["norm2"]["scale"]))
    stem = p["stem"]["tokens"]["embedding"][np.asarray(inputs)] + p["stem"]["positions"]["embedding"]
    x, n = np.concatenate([x, stem], axis=1), inputs.shape[1]
    angles = np.zeros((t + n, 2))
    angles[t:] = [(row, column) for row in range(2) for column in range(3)]
    seen = np.zeros((len(x), t + n, t + n), bool)
    seen[:, :, :t] = mask[:, None]
    seen[:, t:, t:] = np.tri(n)
    if not causal:
        seen[:, :, t:] = True

    def adapt(x, *pair):
        return rms(x) * (1 + pair[0][:, None]) + pair[1][:, None]

    for block in p["blocks"].values():
        scale1, shift1, scale2, shift2 = np.split(linear(block["modulation"], vector), 4, axis=-1)
        x = x + attention(block["attention"], adapt(x, scale1, shift1), seen, angles)
        x = x + mlp(block["mlp"], adapt(x, scale2, shift2))
    return linear(p["head"], adapt(x[:, t:], *np.split(linear(p["modulation"], vector), 2, axis=-1)))


def reference_loss(params, inputs, tokens, counts, words, causal, smoothing):
    logits = reference(params, inputs, words, causal)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at_target = np.take_along_axis(log_p, np.asarray(tokens)[..., None], axis=-1)[..., 0]
    each = -(1 - smoothing) * at_target - smoothing * log_p.mean(-1)
    return each[counts].mean(), at_target[counts].mean(), (log_p.argmax(-1) == tokens)[counts].mean()


@pytest.mark.parametrize("order", ["raster", "masked"])
def test_loss_and_gradient_are_those_of_float64(order):
    family = dataclasses.replace(FAMILY, order=order, label_smoothing=0.1)
    params, key, words, tokens = random_params(), jax.random.key(5), text(), random_tokens()
    batch = {"image": Thirds().detokenize({"scale": 1.0}, tokens), "text": words}
    run = jax.jit(jax.value_and_grad(lambda p: family.losses(p, FROZEN, batch, key)["generator"], has_aux=True))
    (loss, metrics), gradient = run(params)
    flat = np.asarray(tokens).reshape(4, 6)
    if order == "raster":
        inputs, counts = np.concatenate([np.full((4, 1), 3), flat[:, :-1]], axis=1), np.ones((4, 6), bool)
    else:
        counts = np.asarray(draw_mask(jax.random.split(key)[0], 4, 6))
        inputs = np.where(counts, 3, flat)
        assert 0 < counts.sum() < counts.size
    exact = {name: np.asarray(leaf, np.float64) for name, leaf in flatten(params)}
    value = lambda p: reference_loss(unflatten(p), inputs, flat, counts, words, order == "raster", 0.1)  # noqa: E731
    wanted, log_p, accuracy = value(exact)
    np.testing.assert_allclose(loss, wanted, rtol=2e-6)
    np.testing.assert_allclose(metrics["bits_per_token"], -log_p / math.log(2), rtol=2e-6)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    rng, slopes = np.random.default_rng(2), dict(flatten(gradient))
    for name in [*exact, *[None] * 3]:  # along each parameter alone, then along all
        way = {n: rng.normal(size=a.shape) * (name in (n, None)) for n, a in exact.items()}
        ahead, behind = (value({n: a + sign * 1e-5 * way[n] for n, a in exact.items()})[0] for sign in (1, -1))
        slope = sum(float(np.sum(np.asarray(slopes[n], np.float64) * way[n])) for n in exact)
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=2e-4, atol=2e-6, err_msg=str(name))


def test_tokens_made_ahead_give_the_loss_of_the_pictures():
    image = Thirds().detokenize({"scale": 1.0}, random_tokens())
    made = FAMILY.precompute(FROZEN, image)
    np.testing.assert_array_equal(made["tokens"], random_tokens())
    # One operation after the other: two programs would each round in their own way.
    (loss, _), (again, _) = (
        FAMILY.losses(random_params(), FROZEN, {**batch, "text": text()}, jax.random.key(0))["generator"]
        for batch in ({"image": image}, {"tokens": made["tokens"].astype(jnp.int16)})
    )
    assert float(loss) == float(again)
    assert Autoregressive(codec=Palette()).precompute({}, image) == {}


# --- What sees what ---------------------------------------------------------------------------------------------------


def test_a_token_sees_the_text_and_those_before_it_alone():
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 6)))
    plain = np.asarray(logits_of(inputs, text()))
    for i in range(6):
        changed = np.asarray(logits_of(inputs.at[:, i].add(1), text()))
        np.testing.assert_array_equal(changed[:, :i], plain[:, :i])
        assert np.abs(changed[:, i:] - plain[:, i:]).max(axis=(0, 2)).min() > 1e-3
    words = text()
    for other in (
        dataclasses.replace(words, hidden=words.hidden.at[:, 1].add(1.0)),
        dataclasses.replace(words, pooled=words.pooled.at[:, 1].add(1.0)),
    ):
        assert np.abs(np.asarray(logits_of(inputs, other)) - plain).max(axis=(0, 2)).min() > 1e-3


def test_where_masked_every_token_sees_every_other():
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 6)))
    plain = np.asarray(logits_of(inputs, text(), MASKED))
    for i in (0, 5):
        changed = np.asarray(logits_of(inputs.at[:, i].add(1), text(), MASKED))
        assert np.abs(changed - plain).max(axis=(0, 2)).min() > 1e-4


def test_padding_of_the_text_does_not_count():
    words, inputs = text(), jnp.asarray(np.random.default_rng(0).integers(0, 4, (4, 6)))
    padded = dataclasses.replace(
        words,
        hidden=jnp.pad(words.hidden, ((0, 0), (0, 4), (0, 0)), constant_values=9.0),
        mask=jnp.pad(words.mask, ((0, 0), (0, 4))),
    )
    np.testing.assert_allclose(logits_of(inputs, padded), logits_of(inputs, words), atol=1e-5)
    filled = dataclasses.replace(words, hidden=jnp.where(words.mask[..., None], words.hidden, 9.0))
    for family in (FAMILY, MASKED):
        np.testing.assert_array_equal(logits_of(inputs, filled, family), logits_of(inputs, words, family))
        np.testing.assert_array_equal(draw(family, filled, temperature=0.0)[0], draw(family, words, temperature=0.0)[0])


def test_logits_with_a_cache_are_those_without():
    tokens = random_tokens().reshape(4, 6)
    inputs = FAMILY._shifted(tokens)

    @jax.jit
    def walk(params, words):
        network, dtype = FAMILY._network(params, (2, 3), words)
        begun, cache = network.begin(words, dtype)

        def step(cache, i):
            logits, cache = network.step(inputs[:, i], i, begun, cache)
            return cache, logits

        return jax.lax.scan(step, cache, jnp.arange(6))[1].swapaxes(0, 1)

    np.testing.assert_allclose(walk(random_params(), text()), logits_of(inputs, text()), atol=1e-5)


# --- Likelihood -------------------------------------------------------------------------------------------------------


@functools.cache
def all_pictures():
    """Every picture of 2 x 2 tokens, [81, 4, 4, 3]; parameters for that grid; probabilities under one caption."""
    tokens = np.stack(np.meshgrid(*[np.arange(3)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    image = Thirds().detokenize({"scale": 1.0}, jnp.asarray(tokens.reshape(-1, 2, 2)))
    params = random_params(FAMILY, SHAPES._replace(image=(4, 4, 3)))
    caption = jax.tree.map(lambda a: jnp.repeat(a[:1], 81, axis=0), text())
    return tokens, image, params, np.asarray(jitted(FAMILY, "log_likelihood")(params, FROZEN, image, caption), np.float64)


def test_the_probabilities_of_all_pictures_sum_to_one():
    _, _, _, log_p = all_pictures()
    np.testing.assert_allclose(np.exp(log_p).sum(), 1.0, atol=2e-6)
    assert np.exp(log_p).std() > 1e-3  # and are not all alike


def test_pictures_are_drawn_as_often_as_likely():
    tokens, _, params, log_p = all_pictures()
    count = 20_000
    words = jax.tree.map(lambda a: jnp.repeat(a[:1], count, axis=0), text())
    keys = jax.random.split(jax.random.key(7), count)
    unguided = settings((4, 4, 3)), lambda logits, t: logits, 1
    drawn = np.asarray(jax.jit(lambda words, keys: FAMILY._raster(params, words, keys, *unguided)[0])(words, keys))
    found = np.bincount(drawn @ np.array([27, 9, 3, 1]), minlength=81)
    wanted = count * np.exp(log_p)
    assert np.array_equal(tokens @ np.array([27, 9, 3, 1]), np.arange(81))
    assert np.sum((found - wanted) ** 2 / wanted) < 80 + 4 * math.sqrt(160)  # chi squared of 80 degrees, 4 deviations up


def test_captions_are_ranked_by_the_likelihood_of_the_picture():
    _, image, params, _ = all_pictures()
    words, many = text(81, seed=4), jnp.repeat(image[5:6], 81, axis=0)
    scores = np.asarray(jitted(FAMILY, "log_likelihood")(params, FROZEN, many, words))
    assert len(np.unique(scores)) > 70
    order = np.asarray(jitted(FAMILY, "rank_captions")(params, FROZEN, image[5], words))
    assert sorted(order) == list(range(81))
    assert (np.diff(scores[order]) <= 1e-5).all()
    with pytest.raises(UserError, match="order=raster"):
        MASKED.log_likelihood(params, FROZEN, many, words)


# --- Drawing ----------------------------------------------------------------------------------------------------------


def test_cold_is_the_chain_of_likeliest_tokens_with_guidance_too():
    chains = []
    for scale, low, high in ((1.0, 0.0, 1.0), (2.5, 0.0, 1.0), (2.5, 0.5, 1.0), (2.5, 0.0, 0.5), (2.5, 2.0, 3.0)):
        tokens = np.zeros((4, 6), int)
        for i in range(6):
            inputs = FAMILY._shifted(jnp.asarray(tokens))
            given, null = (np.asarray(logits_of(inputs, words))[:, i] for words in (text(), text(seed=9)))
            inside = low <= 1 - i / 6 <= high  # the share to come
            tokens[:, i] = (null + (scale if inside else 1.0) * (given - null)).argmax(-1)
        asked = {"guidance_scale": scale, "guidance_low": low, "guidance_high": high}
        np.testing.assert_array_equal(draw(temperature=0.0, **asked)[0], tokens)
        np.testing.assert_array_equal(draw(temperature=0.0, seed=5, **asked)[0], tokens)
        np.testing.assert_array_equal(draw(top_k=1, temperature=1.7, **asked)[0], tokens)
        np.testing.assert_array_equal(draw(top_p=1e-6, **asked)[0], tokens)
        chains.append(tokens)
    plain, guided, early, late, never = chains
    np.testing.assert_array_equal(never, plain)
    assert len({chain.tobytes() for chain in (plain, guided, early, late)}) == 4


@pytest.mark.parametrize("family", [FAMILY, MASKED], ids=["raster", "masked"])
def test_a_picture_hangs_on_its_own_key_and_caption_alone(family):
    first = np.asarray(draw(family)[0])
    assert (first != np.asarray(draw(family, seed=1, temperature=0.9, top_k=2, num_steps=4)[0])).any()
    assert jitted(family, "draw")._cache_size() == 1  # all numbers are traced
    keys = jax.random.split(jax.random.key(0), 4).at[1:].set(jax.random.split(jax.random.key(8), 3))
    words = jax.tree.map(lambda a, b: a.at[1:].set(b[1:]), text(), text(seed=6))
    other = np.asarray(draw(family, words, keys=keys)[0])
    np.testing.assert_array_equal(first[0], other[0])
    assert (first[1:] != other[1:]).any()
    # The null caption's pass at a scale of 1 changes nothing.
    np.testing.assert_array_equal(first, draw(family, null=text(seed=11))[0])
    guided = np.asarray(draw(family, guidance_scale=1.000001)[0])
    np.testing.assert_array_equal(first, guided)


@pytest.mark.parametrize("family", [FAMILY, MASKED], ids=["raster", "masked"])
def test_the_trace_fills_up_to_the_picture(family):
    family = Compiled(**{f.name: getattr(family, f.name) for f in dataclasses.fields(family)})
    inputs = random_params(), FROZEN, text(), text(seed=9), jax.random.split(jax.random.key(0), 4), settings()
    tokens, when, rounds = family.draw(inputs[0], *inputs[2:])
    picture = np.asarray(to_uint8(Thirds().detokenize({"scale": 1.0}, tokens.reshape(4, 2, 3))))
    np.testing.assert_array_equal(family.sample(*inputs), picture)
    frames = np.asarray(family.trace(*inputs, 3))
    assert frames.shape == (3, 4, *IMAGE)
    np.testing.assert_array_equal(frames[-1], picture)
    when = np.asarray(when).reshape(4, 2, 3).repeat(2, 1).repeat(2, 2)
    for k in (0, 1):
        shown = when < round(int(rounds) * (k + 1) / 3)
        assert 0 < shown.sum() < shown.size
        np.testing.assert_array_equal(frames[k], np.where(shown[..., None], picture, 128))


# --- Masked -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 6, 64])
def test_the_schedule_ends_with_all_tokens_whatever_the_number_of_rounds(count):
    run = jax.jit(
        lambda rounds: jax.lax.scan(lambda b, k: (masked_after(k, rounds, count, b),) * 2, count, jnp.arange(count))[1]
    )
    for rounds in range(1, count + 1):
        left = np.asarray(run(rounds))[:rounds]
        assert left[-1] == 0
        assert (np.diff([count, *left]) <= -1).all()
        share = np.floor(count * np.cos(np.pi / 2 * np.arange(1, rounds + 1) / rounds) + 1e-4)
        if (np.diff([count, *share]) <= -1).all():  # wherever the cosine alone would do
            np.testing.assert_array_equal(left, np.maximum(share, 0))
    if count == 64:
        np.testing.assert_array_equal(np.asarray(run(8))[:8], [62, 59, 53, 45, 35, 24, 12, 0])
        np.testing.assert_array_equal(np.asarray(run(64))[[0, 1, 62, 63]], [63, 62, 1, 0])


def test_training_masks_a_cosine_share():
    mask = np.asarray(draw_mask(jax.random.key(0), 4000, 50))
    share = mask.mean(axis=1)
    assert share.min() > 0
    u = (np.arange(4000) + 0.5) / 4000
    np.testing.assert_allclose(np.sort(share), np.sort(np.maximum(np.ceil(50 * np.cos(np.pi / 2 * u)), 1) / 50), atol=0.05)
    np.testing.assert_allclose(mask.mean(axis=0), share.mean(), atol=0.03)  # no place is favoured


def test_masked_rounds_take_the_surest_tokens():
    for steps in range(1, 8):
        tokens, when, rounds = (np.asarray(a) for a in draw(MASKED, num_steps=steps, temperature=0.0, guidance_scale=2.0))
        assert rounds == min(steps, 6)  # more rounds than tokens are as many
        assert ((when >= 0) & (when < rounds)).all()
        wanted, taken, left = np.full((4, 6), 3), np.full((4, 6), 6), 6
        for k in range(rounds):
            given, null = (np.asarray(logits_of(jnp.asarray(wanted), w, MASKED), np.float64) for w in (text(), text(seed=9)))
            logits = null + 2.0 * (given - null)
            sure = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).max(-1)
            left = int(np.clip(np.floor(6 * np.cos(np.pi / 2 * (k + 1) / rounds) + 1e-4), rounds - 1 - k, left - 1))
            for row in range(4):
                hidden = np.flatnonzero(wanted[row] == 3)
                now = hidden[np.argsort(-sure[row, hidden])][: len(hidden) - left]
                wanted[row, now], taken[row, now] = logits[row, now].argmax(-1), k
        np.testing.assert_array_equal(tokens, wanted)
        np.testing.assert_array_equal(when, taken)


def test_noise_on_which_tokens_are_surest_falls_to_zero():
    keys = jax.random.split(jax.random.key(0), 4)
    tokens, when, _ = (np.asarray(a) for a in draw(MASKED, keys=keys, num_steps=3, top_k=1, temperature=0.5))
    hidden, left = np.ones((4, 6), bool), 6
    for k, share in enumerate((2 / 3, 1 / 3, 0)):
        logits = np.asarray(logits_of(jnp.asarray(np.where(hidden, 3, tokens)), text(), MASKED), np.float64)
        sure = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).max(-1)
        noise = [jax.random.gumbel(jax.random.split(jax.random.fold_in(key, k), 7)[0], (6,)) for key in keys]
        noisy = sure + 4.5 * 0.5 * share * np.asarray(noise)
        left = int(np.clip(np.floor(6 * np.cos(np.pi / 2 * (k + 1) / 3) + 1e-4), 2 - k, left - 1))
        now = hidden & (np.argsort(np.argsort(np.where(hidden, noisy, np.inf))) >= left)
        np.testing.assert_array_equal(when == k, now)
        np.testing.assert_array_equal(tokens[now], logits.argmax(-1)[now])
        hidden &= ~now
    assert (when != np.asarray(draw(MASKED, num_steps=3, temperature=0.0)[1])).any()


# --- The house --------------------------------------------------------------------------------------------------------


def test_flops_are_those_xla_counts():
    shapes = Shapes((24, 24, 3), 12, 10)
    family = Autoregressive(codec=Palette(5), network=TokenTransformer(width=64, depth=1, head_dim=16))
    params = jax.eval_shape(lambda: family.init(jax.random.key(0), shapes))
    words = TextFeatures(jnp.zeros((1, 6, 12)), jnp.zeros((1, 10)), jnp.ones((1, 6), bool))
    run = jax.jit(lambda params, ids: family._logits(params, (24, 24), ids, words))
    cost = run.lower(params, jax.ShapeDtypeStruct((1, 576), jnp.int32)).cost_analysis()
    assert 0.6 < family.flops(shapes, 6) / cost["flops"] < 1.05
    assert family.train_flops(shapes, 6) == 3 * family.flops(shapes, 6)


def test_half_precision_parameters_compute_in_it():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), random_params())
    inputs = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 6)))
    network, dtype = FAMILY._network(half, (2, 3), text())
    assert jax.eval_shape(lambda: network(inputs, text(), dtype)).dtype == dtype == jnp.bfloat16
    assert jax.eval_shape(lambda: FAMILY._logits(half, (2, 3), inputs, text())).dtype == jnp.float32


class Continuous(Codec):
    pass


def test_what_cannot_be_is_told():
    with pytest.raises(UserError, match="continuous"):
        Autoregressive(codec=Pretrained("here", codec=Continuous())).resolve()
    with pytest.raises(UserError, match="odd"):
        FAMILY.init(jax.random.key(0), SHAPES._replace(image=(5, 6, 3)))
    with pytest.raises(UserError, match=r"family.label_smoothing=1.0"):
        dataclasses.replace(FAMILY, label_smoothing=1.0).validate()
    with pytest.raises(UserError, match=r"family.choice_temperature=-1"):
        dataclasses.replace(FAMILY, choice_temperature=-1.0).validate()
    assert (FAMILY.samplers, MASKED.samplers) == (("raster",), ("masked",))
    assert FAMILY.resolve() == FAMILY


@dataclass(frozen=True)
class Many(Thirds):
    """8 x 8 tokens of 32 x 32 pixels."""

    vocab: int = 512

    def latent_shape(self, image):
        return image[0] // 4, image[1] // 4, 3


@pytest.mark.parametrize("name", ["scenes_ar", "scenes_ar_pixels", "emoji_ar", "emoji_tokenizer"])
def test_the_shipped_configurations_are_whole(name):
    config = configs.load(f"configs/{name}.py")
    assert configs.from_dict(type(config), configs.to_dict(config)) == config
    if name == "scenes_ar":
        family = dataclasses.replace(config.family, codec=Pretrained(codec=Many(512)))
        params = jax.eval_shape(lambda: family.init(jax.random.key(0), Shapes((32, 32, 3), 384, 384)))
        assert sum(p.size for p in jax.tree.leaves(params)) <= 1.3e6
