"""Frequencies of rotary positions against their papers' formulas, worked out number by number."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.text.rotary import Rotary, read

PLAIN = [1.0, 0.1, 0.01, 0.001]  # theta = 10^4, a head of 8 numbers
SHORT, LONG = [1.0, 2.0, 4.0, 5.0], [2.0, 5.0, 8.0, 10.0]


def made(head_dim=8, **fields):
    return read({"max_position_embeddings": 100} | fields, "here.json", head_dim)


def scaled(kind, **fields):
    return made(rope_scaling={"rope_type": kind} | fields)


def test_without_scaling_pair_i_turns_by_theta_to_the_minus_2i_over_d():
    np.testing.assert_allclose(made().frequencies, PLAIN)
    np.testing.assert_allclose(made(rope_theta=16.0).frequencies, [1, 0.5, 0.25, 0.125])
    np.testing.assert_allclose(made(head_dim=4).frequencies, [1, 0.01])
    assert made().scale == 1.0


def test_tables_are_cosines_and_sines_of_position_times_frequency():
    cos, sin = Rotary((1.0, 0.25), scale=3.0).tables(jnp.array([[0, 1, 6]]), jnp.array([7]))
    assert cos.shape == sin.shape == (1, 1, 3, 2)
    assert cos.dtype == jnp.float32
    angles = np.array([[0, 0], [1, 0.25], [6, 1.5]])
    np.testing.assert_allclose(cos[0, 0], 3 * np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin[0, 0], 3 * np.sin(angles), atol=1e-6)


def test_linear_divides_all():
    np.testing.assert_allclose(scaled("linear", factor=4).frequencies, np.array(PLAIN) / 4)


def test_llama3_keeps_fast_pairs_slows_slow_ones_and_mixes_between():
    """Wavelengths 2 pi / f: 6.3, 62.8, 628, 6283; those below 100 / 4 stay, those beyond 100 / 1 are divided by 8."""
    found = scaled("llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=100)
    share = (100 / (2 * math.pi / 0.1) - 1) / (4 - 1)
    np.testing.assert_allclose(found.frequencies, [1.0, 0.1 * ((1 - share) / 8 + share), 0.01 / 8, 0.001 / 8])
    assert 0.1 < share < 0.9


def test_dynamic_grows_the_base_with_a_rows_own_length():
    rotary = made(max_position_embeddings=10, rope_scaling={"type": "dynamic", "factor": 3.0})
    lengths = np.array([4, 10, 11, 25])
    cos, sin = rotary.tables(jnp.ones((1, 1), jnp.int32), jnp.array(lengths))
    assert cos.shape == (4, 1, 1, 4)
    for row, length in enumerate(lengths):
        base = 10_000 * (3 * max(length, 10) / 10 - 2) ** (8 / 6)
        np.testing.assert_allclose(np.arctan2(sin, cos)[row, 0, 0], base ** (-np.arange(0, 8, 2) / 8), rtol=1e-5)
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0, 0], PLAIN, rtol=1e-5)
    assert scaled("dynamic", factor=0.5).stretch == 1.0


def test_yarn_has_a_ramp_between_pairs_that_turn_often_and_seldom():
    """Within 100 positions pair i turns 100 f / 2 pi times: twice at i = 0.90…, 0.05 times at i = 2.5…."""
    given = {"factor": 4.0, "original_max_position_embeddings": 100, "beta_fast": 2.0, "beta_slow": 0.05}
    first, last = (4 * math.log(100 / (n * 2 * math.pi)) / math.log(10_000) for n in (2.0, 0.05))
    assert 0 < first < 1
    assert 2 < last < 3
    for truncate, low, high in ((True, 0, 3), (False, first, last)):
        ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(4)]
        wanted = [f * (1 - r) + f / 4 * r for f, r in zip(PLAIN, ramp, strict=True)]
        np.testing.assert_allclose(scaled("yarn", truncate=truncate, **given).frequencies, wanted)
    assert scaled("yarn", **given) == scaled("yarn", truncate=True, **given)
    assert scaled("yarn", **given).scale == 0.1 * math.log(4) + 1
    assert scaled("yarn", attention_factor=1.5, **given).scale == 1.5
    mixed = scaled("yarn", mscale=0.5, mscale_all_dim=2.0, **given).scale
    assert mixed == pytest.approx((0.05 * math.log(4) + 1) / (0.2 * math.log(4) + 1))


def test_yarn_rotates_32_times_and_once_by_default_and_takes_the_factor_from_the_lengths():
    given = {"original_max_position_embeddings": 1000, "rope_theta": 100.0, "truncate": False}
    found = made(max_position_embeddings=3000, rope_scaling={"type": "yarn"} | given)
    assert found == made(
        rope_scaling={"rope_type": "yarn", "factor": 3.0, "beta_fast": 32, "beta_slow": 1} | given, max_position_embeddings=7
    )
    assert found.scale == 0.1 * math.log(3) + 1


def test_yarns_ramp_stays_within_a_head_and_may_be_a_step():
    """At 5 positions no pair turns twice, so the ramp begins at pair 0; for theta = 2 all turn so often that it ends at 7."""
    given = {"factor": 4.0, "beta_fast": 2.0, "truncate": False}
    short = scaled("yarn", original_max_position_embeddings=5, beta_slow=0.05, **given).frequencies
    last = 4 * math.log(5 / (0.05 * 2 * math.pi)) / math.log(10_000)
    np.testing.assert_allclose(short, [f * (1 - i / last * 0.75) if i < last else f / 4 for i, f in enumerate(PLAIN)])
    wide = scaled("yarn", original_max_position_embeddings=5, beta_slow=1e-3, rope_theta=2.0, **given).frequencies
    np.testing.assert_allclose(wide, [2 ** (-i / 4) * (1 - i / 7 * 0.75) for i in range(4)])
    step = scaled("yarn", original_max_position_embeddings=100, beta_slow=2.0, **given).frequencies
    np.testing.assert_allclose(step, [1.0, 0.1 / 4, 0.01 / 4, 0.001 / 4])


def test_longrope_has_other_frequencies_for_rows_beyond_the_original_length():
    given = {"short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 20}
    rotary = scaled("longrope", **given)
    cos, sin = rotary.tables(jnp.ones((1, 1), jnp.int32), jnp.array([3, 20, 21]))
    turns = np.arctan2(sin, cos)[:, 0, 0]
    np.testing.assert_allclose(turns[:2], np.tile(np.array(PLAIN) / SHORT, (2, 1)), rtol=1e-5)
    np.testing.assert_allclose(turns[2], np.array(PLAIN) / LONG, rtol=1e-5)
    assert rotary.scale == pytest.approx(math.sqrt(1 + math.log(5) / math.log(20)))
    assert scaled("longrope", factor=2.0, **given).scale == pytest.approx(math.sqrt(1 + math.log(2) / math.log(20)))
    assert scaled("longrope", factor=0.5, **given).scale == 1.0
    assert scaled("longrope", attention_factor=1.25, **given).scale == 1.25
    given.pop("original_max_position_embeddings")
    outside = made(original_max_position_embeddings=20, rope_scaling={"type": "longrope", **given})
    assert outside == rotary
    assert scaled("longrope", original_max_position_embeddings=10**20, **given).limit == 100


def test_old_and_new_fields_mean_the_same():
    linear = {"factor": 2.0}
    assert made(rope_theta=50.0, rope_scaling={"type": "linear"} | linear) == made(
        rope_parameters={"rope_type": "linear", "rope_theta": 50.0} | linear
    )
    assert made(rope_theta=50.0, rope_parameters={"rope_type": "default"}) == made(rope_theta=50.0)
    assert made(rope_theta=60.0, rope_parameters={"rope_theta": 50.0}) == made(rope_theta=50.0)
    assert made(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}) == made()


def test_each_type_of_layer_may_have_its_own():
    values = {
        "max_position_embeddings": 100,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0},
            "sliding_attention": {"rope_theta": 16.0},
        },
    }
    np.testing.assert_allclose(read(values, "here.json", 8).frequencies, np.array(PLAIN) / 2)
    np.testing.assert_allclose(read(values, "here.json", 8, layer="sliding_attention").frequencies, [1, 0.5, 0.25, 0.125])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"type": "su"}}, "rotary positions of type 'su' are not supported; default, linear,"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None of the rotary positions must be a positive number"),
        ({"rope_scaling": {"type": "dynamic", "factor": -1}}, "factor=-1 of the rotary"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "32"}}, "beta_fast='32' of the rotary"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor=True of the rotary"),
        ({"rope_theta": float("nan")}, "rope_theta=nan of the rotary"),
        ({"rope_theta": 10**400}, "of the rotary positions must be a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor=4 must be greater than low_freq_factor=4",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT}}, "must be 4 positive numbers each"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": [1, 0, 1, 1]}}, "must be 4 positive"),
    ],
)
def test_what_makes_no_sense_is_told(fields, message):
    with pytest.raises(UserError) as error:
        made(**fields)
    assert str(error.value).startswith("here.json: ")
    assert message in str(error.value)
