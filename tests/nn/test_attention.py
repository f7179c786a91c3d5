import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen.nn.attention import Attention, attend, rotary_2d, rotate
from jaxgen.nn.module import bind, flatten, init_params, logical_axes, unflatten


def reference(q, k, v, mask):
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                logits = np.array([q[b, h, i] @ k[b, h, j] / np.sqrt(q.shape[-1]) for j in range(k.shape[2])])
                logits[~mask[b]] = -np.inf
                weights = np.exp(logits - logits.max())
                out[b, h, i] = (weights / weights.sum()) @ v[b, h]
    return out


def test_attend_agrees_with_a_loop_in_float64():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 3, 4, 8)), rng.normal(size=(2, 3, 6, 8)), rng.normal(size=(2, 3, 6, 8))
    mask = rng.random((2, 6)) < 0.6
    mask[:, 0] = True
    got = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), jnp.asarray(mask))
    np.testing.assert_allclose(got, reference(q, k, v, mask), atol=2e-6)


def test_rotation_depends_on_relative_positions_alone():
    cos, sin = rotary_2d(4, 5, 16)
    rng = np.random.default_rng(1)
    q, k = jnp.asarray(rng.normal(size=16), jnp.float32), jnp.asarray(rng.normal(size=16), jnp.float32)
    everywhere = lambda a: rotate(jnp.broadcast_to(a, (1, 1, 20, 16)), cos, sin)[0, 0]  # noqa: E731
    scores = np.asarray(everywhere(q) @ everywhere(k).T).reshape(4, 5, 4, 5)
    np.testing.assert_allclose(scores[0, 0, 2, 3], scores[1, 1, 3, 4], atol=1e-5)
    np.testing.assert_allclose(scores[2, 3, 0, 0], scores[3, 4, 1, 1], atol=1e-5)
    assert abs(scores[0, 0, 2, 3] - scores[0, 0, 3, 2]) > 1e-3  # rows and columns are told apart
    np.testing.assert_allclose(jnp.linalg.norm(everywhere(q), axis=-1), np.linalg.norm(q), rtol=1e-5)


def build(rngs: nnx.Rngs) -> Attention:
    return Attention(32, 8, rngs, context_dim=12)


def test_masked_context_does_not_count():
    key = jax.random.key(0)
    params = jax.tree.map(lambda p: jax.random.normal(key, p.shape) * 0.3, init_params(build, key))
    x, context = jax.random.normal(key, (2, 5, 32)), jax.random.normal(key, (2, 4, 12))
    mask = jnp.concatenate([jnp.ones((2, 5), bool), jnp.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)], axis=1)
    run = jax.jit(lambda context: bind(build, params)(x, context=context, mask=mask))
    changed = context.at[0, 2:].set(7.0).at[1, 1:].set(-3.0)
    np.testing.assert_array_equal(run(context), run(changed))
    assert np.abs(run(context) - run(context.at[0, 1].add(1.0))).max() > 1e-3


def test_parameters_travel_as_plain_dictionaries():
    params = init_params(build, jax.random.key(3))
    axes = logical_axes(build)
    assert jax.tree.structure(params) == jax.tree.structure(axes, is_leaf=lambda a: isinstance(a, tuple))
    assert axes["q"] == ("embed", "heads", "kv")
    flat = dict(flatten(params))
    assert list(flat) == sorted(flat)
    assert "q_norm.scale" in flat
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, params, unflatten(flat)))
    with pytest.raises(KeyError):
        bind(build, {name: value for name, value in params.items() if name != "v"})
