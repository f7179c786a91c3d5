import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxgen.nn.layers import RMSNorm, dropout, modulate, patchify, time_features, unpatchify
from jaxgen.nn.module import bind, init_params


@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_patches_come_back_whole(rows, columns, patch, channels):
    x = np.arange(2 * rows * columns * patch**2 * channels)  # NumPy's: no program is compiled for every shape
    x = x.reshape(2, rows * patch, columns * patch, channels)
    patches = patchify(x, patch)
    assert patches.shape == (2, rows, columns, patch**2 * channels)
    np.testing.assert_array_equal(unpatchify(patches, patch), x)
    np.testing.assert_array_equal(patches[0, 0, 0], x[0, :patch, :patch].reshape(-1))


def test_rms_norm_has_unit_rms_in_float32_and_keeps_the_dtype():
    build = lambda rngs: RMSNorm(64, rngs)  # noqa: E731
    params = init_params(build, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 64)) * 50
    y = bind(build, params)(x)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(y**2, -1)), 1.0, rtol=1e-5)
    assert bind(build, params)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((200, 200))
    y = dropout(x, 0.25, jax.random.key(0))
    assert abs(float(jnp.mean(y == 0)) - 0.25) < 0.01
    np.testing.assert_allclose(jnp.max(y), 1 / 0.75)
    assert dropout(x, 0.25, None) is x


def test_modulation_is_per_example():
    x = jnp.ones((2, 3, 3, 4))
    y = modulate(x, jnp.array([[1.0] * 4, [0.0] * 4]), jnp.array([[0.0] * 4, [5.0] * 4]))
    np.testing.assert_array_equal(y[0], jnp.full((3, 3, 4), 2.0))
    np.testing.assert_array_equal(y[1], jnp.full((3, 3, 4), 6.0))


def test_time_features_tell_close_times_apart():
    features = time_features(jnp.array([0.0, 0.5, 0.501, 1.0]), 128)
    distance = jnp.linalg.norm(features[:, None] - features[None], axis=-1)
    assert features.shape == (4, 128)
    assert float(distance[1, 2]) > 0.1
