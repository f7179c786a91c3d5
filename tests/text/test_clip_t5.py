"""What test_parity.py's cases do not say about CLIP and T5."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.errors import UserError
from jaxgen.nn.module import bind, flatten, logical_axes
from jaxgen.parallel.mesh import RULES, MeshConfig, make_mesh
from jaxgen.text import adapt, registry
from jaxgen.text.encoder import load_pretrained
from jaxgen.text.t5 import buckets
from tests.text.cases import Case
from tests.text.test_parity import error

CASES = ["clip_l", "clip_bigg", "t5", "t5_v11", "umt5"]
T5 = {"model_type": "t5", "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def load(name, directory, **options):
    case = Case(name)
    case.write(directory)
    return load_pretrained(str(directory), **options), *(jnp.asarray(case.stored[key]) for key in ("ids", "mask"))


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(architecture, params, ids, mask, dtype):
    return jnp.stack(bind(architecture.build, params)(ids, mask, dtype)[0]).astype(jnp.float32)


def states(architecture, params, ids, mask, dtype=jnp.float32):
    """Of the real tokens: [layers + 1, N, D], float32."""
    return np.asarray(run(architecture, params, ids, mask, dtype))[:, np.asarray(mask) > 0]


def exact_bucket(distance, count, furthest):
    """In integers: the ranges' limits are exact (furthest / exact)^(k / n), k = 0 to n."""
    half = count // 2
    exact, away = half // 2, abs(distance)
    bucket = min(away, exact)
    while bucket >= exact and bucket < half - 1:
        power = Fraction(furthest, exact) ** (bucket + 1 - exact)
        if Fraction(away, exact) ** (half - exact) < power:
            break
        bucket += 1
    return bucket + half * (distance > 0)


@pytest.mark.parametrize(("count", "furthest"), [(32, 128), (8, 10), (64, 256), (9, 20), (4, 128)])
def test_every_distance_has_its_bucket(count, furthest):
    distances = np.arange(-600, 601)
    found = buckets(distances, count, furthest)
    np.testing.assert_array_equal(found, [exact_bucket(int(d), count, furthest) for d in distances])
    # A distance of 0 counts as behind: the first bucket of the other half stays empty.
    assert set(found) == set(range(count // 2 * 2)) - {count // 2}


@pytest.mark.parametrize("end", [2, 95])
def test_clip_pools_at_the_first_end_token_or_the_largest_id(tmp_path, end):
    model, *_ = load("clip_l", tmp_path)
    architecture = dataclasses.replace(model.architecture, eos_token_id=end)
    ids = jnp.asarray([[5, 9, 95, 95, 95], [5, 95, 7, 96, 2], [95, 96, 3, 96, 95]])
    last = jnp.broadcast_to(jnp.arange(5.0)[None, :, None], (3, 5, 32))
    pooled = bind(architecture.build, model.params).pool(last, ids, jnp.ones_like(ids))
    np.testing.assert_array_equal(pooled[:, 0], [2, 3, 1] if end == 2 else [2, 1, 0])


def test_t5_pools_the_mean_of_the_real_tokens(tmp_path):
    model, ids, mask = load("t5", tmp_path)
    last = jnp.asarray(np.random.default_rng(0).normal(size=(*ids.shape, 32)), jnp.float32)
    pooled = bind(model.architecture.build, model.params).pool(last, ids, mask)
    for i, n in enumerate(np.asarray(mask).sum(1)):
        np.testing.assert_allclose(pooled[i], np.asarray(last)[i, :n].mean(0), atol=1e-6)


@pytest.mark.parametrize(("name", "causal"), [("clip_l", True), ("t5_v11", False), ("umt5", False)])
def test_only_clip_reads_from_left_to_right(tmp_path, name, causal):
    model, ids, mask = load(name, tmp_path)
    before = states(model.architecture, model.params, ids[:1], mask[:1])[-1]
    after = states(model.architecture, model.params, ids[:1].at[0, 8].add(1), mask[:1])[-1]
    assert np.array_equal(before[:8], after[:8]) == causal
    assert not np.array_equal(before[8:], after[8:])


@pytest.mark.parametrize("name", ["clip_l", "t5_v11", "umt5"])
def test_padding_does_not_matter(tmp_path, name):
    model, ids, mask = load(name, tmp_path)
    before = states(model.architecture, model.params, ids, mask)
    after = states(model.architecture, model.params, jnp.where(mask > 0, ids, 77), mask)
    np.testing.assert_array_equal(before, after)
    alone = states(model.architecture, model.params, ids[1:2, :7], mask[1:2, :7])
    assert error(before[:, 11:18], alone) <= 1e-5


@pytest.mark.parametrize("name", ["clip_l", "umt5"])
def test_additions_begin_as_nothing_and_count_once_trained(tmp_path, name):
    model, ids, mask = load(name, tmp_path)
    plain = states(model.architecture, model.params, ids, mask)

    def added(method):
        params = method.merge(model.params, method.init(jax.random.key(0), model.params, model.architecture))
        return adapt.fitted(model.architecture, params), params

    architecture, params = added(adapt.Bottleneck(4))
    np.testing.assert_array_equal(states(architecture, params, ids, mask), plain)
    for adapter in ("adapter1", "adapter2"):
        up = params["layers"]["0"][adapter]["up"]
        changed = {**params, "layers": jax.tree.map(lambda x: x, params["layers"])}
        changed["layers"]["0"][adapter]["up"] = {"kernel": up["kernel"] + 0.1, "bias": up["bias"]}
        assert error(states(architecture, changed, ids, mask), plain) > 1e-3
    architecture, params = added(adapt.Prefix(3))
    for i in params["layers"]:
        params["layers"][i]["prefix"]["v"] = jnp.ones_like(params["layers"][i]["prefix"]["v"])
    assert error(states(architecture, params, ids, mask)[1], plain[1]) > 1e-4


@pytest.mark.parametrize("name", ["clip_bigg", "t5_v11"])
def test_a_mesh_changes_nothing(tmp_path, name):
    model, ids, mask = load(name, tmp_path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed, *_ = load(name, tmp_path, mesh=mesh)
    split = {key: leaf.sharding.spec for key, leaf in flatten(placed.params)}
    assert tuple(split["layers.0.q.kernel"]) == ("fsdp", "tensor")
    assert tuple(split["layers.0.down.kernel"]) == ("tensor", "fsdp")
    plain = states(model.architecture, model.params, ids, mask)
    assert error(states(placed.architecture, placed.params, ids, mask), plain) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_parameters_carry_logical_axes(tmp_path, name):
    model, *_ = load(name, tmp_path)
    axes = dict(flatten(logical_axes(model.architecture.build)))
    assert axes.keys() == dict(flatten(model.params)).keys()
    assert {axis for names in axes.values() for axis in names} <= RULES.keys()
    assert axes["words.embedding"] == ("vocab", "embed")
    kernels = {key: names for key, names in axes.items() if key.endswith("kernel") and key.startswith("layers")}
    assert all(None not in names for names in kernels.values())


@pytest.mark.parametrize("name", ["clip_l", "t5_v11"])
def test_bfloat16_is_near(tmp_path, name):
    model, ids, mask = load(name, tmp_path)
    half, *_ = load(name, tmp_path, dtype=jnp.bfloat16)
    wide = states(model.architecture, model.params, ids, mask)
    near = states(half.architecture, half.params, ids, mask, jnp.bfloat16)
    # These random weights make attention nearly one-hot, which amplifies; the mean stays small.
    assert np.abs(near - wide).mean() / np.abs(wide).mean() < 0.05


def test_what_old_files_leave_out():
    clip = registry.architecture({"model_type": "clip_text_model"}, "")
    assert (clip.vocab_size, clip.max_length, clip.hidden_size, clip.eos_token_id) == (49408, 77, 512, 49407)
    assert (clip.hidden_act, clip.pooled_size, clip.projected) == ("quick_gelu", 512, False)
    assert registry.architecture(T5, "").feed_forward_proj == "relu"
    assert registry.architecture(T5, "").max_length == 512
    assert registry.architecture(T5 | {"n_positions": 64}, "").max_length == 64
    for kind in ("mt5", "umt5"):
        assert registry.architecture(T5 | {"model_type": kind}, "").feed_forward_proj == "gated-gelu"


def test_a_whole_clip_projects_to_its_own_width():
    """Its text part may name another one, transformers' default."""
    values = {"model_type": "clip", "projection_dim": 24, "text_config": {"projection_dim": 512, "architectures": None}}
    architecture = registry.architecture(values, "")
    assert (architecture.pooled_size, architecture.projected) == (24, True)
    # What save_text_encoder writes means the same.
    assert registry.architecture(registry.text_config(values), "") == architecture


@pytest.mark.parametrize(
    ("values", "head", "message"),
    [
        (
            {"model_type": "clip_text_model"},
            "classification",
            "a CLIP text model encodes captions; it has no classification head",
        ),
        ({"model_type": "clip_text_model", "hidden_act": "swish"}, "", "hidden_act='swish' is not supported"),
        ({"model_type": "clip_text_model", "eos_token_id": [1, 2]}, "", r"eos_token_id=\[1, 2\] makes no sense"),
        ({"model_type": "clip_text_model", "num_attention_heads": 5}, "", "512 does not divide among 5"),
        (T5, "lm", "of a t5 the encoder is read; it has no lm head"),
        ({k: v for k, v in T5.items() if k != "d_kv"}, "", "lacks d_kv"),
        (T5 | {"feed_forward_proj": "gated-swiglu"}, "", "feed_forward_proj='gated-swiglu' is not supported"),
        (T5 | {"is_decoder": True}, "", "is_decoder=True is not supported"),
        (T5 | {"relative_attention_num_buckets": 2}, "", "num_buckets=2 do not divide distances"),
        (T5 | {"relative_attention_max_distance": 8}, "", "max_distance=8"),
    ],
)
def test_what_is_not_done_is_told(values, head, message):
    with pytest.raises(UserError, match=f"^here.json: .*{message}|^here.json {message}"):
        registry.architecture(values, "here.json", head)
