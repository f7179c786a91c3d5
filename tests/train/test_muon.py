import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, muon

from jaxgen.parallel.mesh import MeshConfig, make_mesh
from jaxgen.train.config import OptimizerConfig
from jaxgen.train.muon import newton_schulz
from jaxgen.train.optimizers import make_optimizer

SHAPES = {
    "linear": {"kernel": (48, 32), "bias": (32,)},
    "wide": {"kernel": (16, 64)},
    "conv": {"kernel": (3, 3, 16, 32)},
    "attention": {"q": (32, 4, 8), "out": (4, 8, 32)},
    "stem": {"kernel": (12, 32)},
}
DIMENSIONS = {
    "linear": {"kernel": MuonDimensionNumbers(0, 1), "bias": None},
    "wide": {"kernel": MuonDimensionNumbers(0, 1)},
    "conv": {"kernel": MuonDimensionNumbers((0, 1, 2), 3)},
    "attention": {"q": MuonDimensionNumbers(0, (1, 2)), "out": MuonDimensionNumbers((0, 1), 2)},
    "stem": {"kernel": None},
}


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda node: isinstance(node, tuple))


def test_updates_are_those_of_optax():
    config = OptimizerConfig(name="muon", learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0)
    ours = make_optimizer(config, 10)
    # Without Nesterov's look-ahead, whose bias correction optax alone has, a step from rest is the same in both.
    theirs = muon(
        0.1,
        nesterov=False,
        adam_b1=config.b1,
        adam_b2=config.b2,
        weight_decay=config.weight_decay,
        adam_weight_decay=config.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=DIMENSIONS,
    )
    params, grads = tree(0), tree(1)
    for name in ("linear", "wide", "conv", "attention"):
        ours_step, theirs_step = (o.update(grads, o.init(params), params)[0][name] for o in (ours, theirs))
        for part in set(ours_step) - {"bias"}:
            np.testing.assert_allclose(ours_step[part], theirs_step[part], atol=2e-4 * 0.1, err_msg=f"{name} {part}")


def test_singular_values_come_near_one_whatever_the_scale():
    rng = np.random.default_rng(2)
    for shape, scale in (((24, 24), 1.0), ((100, 12), 1e-4), ((12, 100), 1e4)):
        matrix = jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        u, _, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
        (made,) = newton_schulz([matrix])
        spectrum = np.diag(u.T @ np.asarray(made, np.float64) @ v.T)  # the singular vectors stay
        if shape[0] != shape[1]:
            assert spectrum.min() > 0.6
        assert spectrum.max() < 1.25
    assert not np.asarray(newton_schulz([jnp.zeros((4, 6))])[0]).any()


def test_momentum_looks_ahead():
    config = OptimizerConfig(
        name="muon", learning_rate=1.0, schedule="constant", warmup_steps=0, clip_norm=0.0, weight_decay=0.0, momentum=0.5
    )
    optimizer, params = make_optimizer(config, 10), {"w": jnp.zeros((4, 6))}
    first, second = tree(3)["wide"]["kernel"][:4, :6], tree(4)["wide"]["kernel"][:4, :6]
    state = optimizer.init(params)
    _, state = optimizer.update({"w": first}, state, params)
    updates, _ = optimizer.update({"w": second}, state, params)
    wanted = newton_schulz([second + 0.5 * (second + 0.5 * first)])[0] * -0.2 * np.sqrt(6)
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(3, 1, 1), MeshConfig(2, 2, 2)])
def test_devices_share_the_work_and_agree(mesh):
    matrices = jax.tree.leaves({name: tree(5)[name]["kernel"].reshape(-1, 32) for name in ("linear", "conv", "stem")})
    alone = newton_schulz(matrices)
    shared = jax.jit(lambda some: newton_schulz(some, make_mesh(mesh)))(matrices)
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_ends_and_vectors_take_adamw():
    config = OptimizerConfig(name="muon", learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.0)
    params, grads = tree(0), tree(1)
    optimizer = make_optimizer(config, 10)
    adamw = optax.adamw(0.1, config.b1, config.b2, weight_decay=config.weight_decay)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    plain, _ = adamw.update(grads, adamw.init(params), params)
    np.testing.assert_allclose(updates["stem"]["kernel"], plain["stem"]["kernel"], rtol=1e-5)
    assert np.abs(updates["linear"]["bias"]).max() <= 0.1 * 1.001
