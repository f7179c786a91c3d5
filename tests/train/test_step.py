import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.families.base import Shapes
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.families.unet import UNet
from jaxgen.parallel.mesh import MeshConfig, batch_sharding, make_mesh, on_mesh, replicated
from jaxgen.text.features import TextFeatures
from jaxgen.train.optimizers import OptimizerConfig, learning_rate, make_optimizer
from jaxgen.train.state import create, shardings
from jaxgen.train.step import make_step
from tests.train.toy import Toy

SHAPES = Shapes((16, 16, 3), 12, 8)


def make_batch(size=16, seed=0):
    rng = np.random.default_rng(seed)
    text = TextFeatures(
        rng.normal(size=(size, 6, 12)).astype(np.float32),
        rng.normal(size=(size, 8)).astype(np.float32),
        np.arange(6)[None] < rng.integers(2, 7, (size, 1)),
    )
    return {"image": rng.integers(0, 256, (size, *SHAPES.image), dtype=np.uint8), "text": text}


def start(family, optimizer=None, seed=0, **settings):
    optimizer = optimizer or optax.sgd(0.1)
    groups = jax.eval_shape(lambda: family.init(jax.random.key(0), SHAPES))
    optimizers = dict.fromkeys(groups, optimizer)
    state = create(family, SHAPES, optimizers, seed=0)
    return state, jax.jit(make_step(family, optimizers, seed=seed, **settings))


def largest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


def test_one_sgd_step_is_the_gradient_by_hand():
    state, step = start(Toy())
    batch = make_batch()
    after, metrics = step(state, {}, batch)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 1), 0)
    images = batch["image"].astype(np.float64) / 127.5 - 1
    target = images.mean((1, 2, 3)) + 0.01 * np.asarray(jax.random.normal(key, (16,)), np.float64)
    w = np.asarray(state.params["first"]["w"], np.float64)
    hidden = np.tanh(batch["text"].pooled @ w)
    error = hidden.sum(-1) - target
    np.testing.assert_allclose(metrics["loss"], np.mean(error**2), rtol=1e-5)
    gradient = batch["text"].pooled.T @ (2 / 16 * error[:, None] * (1 - hidden**2))
    np.testing.assert_allclose(after.params["first"]["w"], w - 0.1 * gradient, rtol=1e-5, atol=1e-7)
    of_out = hidden.T @ (2 / 16 * error)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt((gradient**2).sum() + (of_out**2).sum()), rtol=1e-5)
    assert int(after.step) == 1
    assert int(metrics["failed"]) == -1
    # The first step's average has decay min(0.999, 1/10).
    expected = 0.1 * w + 0.9 * np.asarray(after.params["first"]["w"])
    np.testing.assert_allclose(after.ema_params["first"]["w"], expected, rtol=1e-5)


def test_the_noise_of_a_step_is_that_of_its_seed_and_number():
    state, step = start(Toy(), seed=3)
    batch = make_batch()
    _, metrics = step(dataclasses.replace(state, step=jnp.int32(5)), {}, batch)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), 1), 0)
    image = batch["image"] / 127.5 - 1
    loss, _ = Toy().losses(state.params, {}, {"image": image, "text": batch["text"]}, key)["first"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize(("step", "settings", "decay"), [(10**6, {}, 0.999), (10**6, {"ema_decay": 0.5}, 0.5), (8, {}, 0.5)])
def test_the_average_follows_as_fast_as_stated(step, settings, decay):
    state, step_fn = start(Toy(), **settings)
    state = dataclasses.replace(state, step=jnp.int32(step), ema_params=jax.tree.map(lambda p: p + 1, state.params))
    after, _ = step_fn(state, {}, make_batch())
    expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema_params, after.params)
    assert largest(after.ema_params, expected) < 1e-5


def test_a_later_group_sees_the_one_before_it_updated():
    state, step = start(Toy(second=True))
    after, metrics = step(state, {}, make_batch())
    moved = jax.tree.map(lambda a, b: jnp.sum(jnp.square((a - b) / 0.1)), state.params, after.params)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(jax.tree.leaves(moved))), rtol=1e-4)
    pooled = make_batch()["text"].pooled
    predicted = np.tanh(pooled @ np.asarray(after.params["first"]["w"])) @ np.asarray(after.params["first"]["out"])
    np.testing.assert_allclose(metrics["second/loss"], np.mean((1.0 - predicted) ** 2), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], metrics["first/loss"] + metrics["second/loss"], rtol=1e-6)


class Deterministic(Toy):
    def losses(self, params, frozen, batch, key):
        return super().losses(params, frozen, batch, jax.random.key(0)) | {
            "first": (
                jnp.mean((batch["text"].pooled @ params["first"]["w"] - batch["image"].mean((1, 2, 3))[:, None]) ** 2),
                {},
            )
        }


@pytest.mark.parametrize("count", [2, 4, 8])
def test_accumulation_changes_memory_and_not_the_result(count):
    whole, parts = (start(Deterministic(), accumulate=n) for n in (1, count))
    first, metrics = whole[1](whole[0], {}, make_batch())
    second, metrics2 = parts[1](parts[0], {}, make_batch())
    np.testing.assert_allclose(metrics["loss"], metrics2["loss"], rtol=1e-6)
    assert largest(first.params, second.params) < 1e-7


def test_a_non_finite_step_changes_nothing_and_is_named():
    state, step = start(Toy(), optax.adam(0.1))
    state, _ = step(state, {}, make_batch())
    poisoned = make_batch(seed=1)
    poisoned["text"] = dataclasses.replace(poisoned["text"], pooled=np.full_like(poisoned["text"].pooled, np.nan))
    after, metrics = step(state, {}, poisoned)
    assert int(after.control["failed"]) == int(metrics["failed"]) == 1
    assert largest((state.params, state.opt_state, state.ema_params), (after.params, after.opt_state, after.ema_params)) == 0
    later, _ = step(after, {}, make_batch(seed=2))
    assert int(later.step) == 1
    assert largest(later.params, state.params) == 0


class Broken(Toy):
    """One of loss and gradient is not finite, the other is."""

    def losses(self, params, frozen, batch, key):
        squares, total = jnp.sum(params["first"]["w"] ** 2), batch["text"].pooled.sum()
        losses = {"loss": squares + jnp.sqrt(total), "gradient": jnp.sqrt(squares * jnp.maximum(total, 0.0))}  # at 0: 0 / 0
        return {"first": (losses[self.what], {})}


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_first_step_of_which_only_one_number_is_not_finite_changes_nothing(what):
    Broken.what = what
    state, step = start(Broken())
    bad, good = make_batch(), make_batch()
    bad["text"], good["text"] = (
        dataclasses.replace(bad["text"], pooled=np.full_like(bad["text"].pooled, sign)) for sign in (-1, 1)
    )
    fine, metrics = step(state, {}, good)
    assert (int(metrics["failed"]), int(fine.step)) == (-1, 1)
    after, metrics = step(state, {}, bad)
    assert np.isfinite(metrics["loss"]) == (what == "gradient")
    later, metrics = step(after, {}, good)
    assert (int(metrics["failed"]), int(later.step)) == (0, 0)
    assert largest((state.params, state.ema_params), (later.params, later.ema_params)) == 0


def test_token_ids_are_encoded_inside_the_step():
    family = Toy()
    table = jax.random.normal(jax.random.key(0), (50, 8))

    def encode(params, ids, mask):
        pooled = (params["table"][ids] * mask[..., None]).sum(1)
        return TextFeatures(jnp.zeros((*ids.shape, 12)), pooled, mask > 0)

    ids = np.random.default_rng(0).integers(0, 50, (16, 6)).astype(np.int32)
    mask = np.ones_like(ids)
    state, step = start(family, encode=encode)
    batch = {"image": make_batch()["image"], "input_ids": ids, "attention_mask": mask}
    inside, _ = step(state, {"text": {"table": table}}, batch)
    _, plain = start(family)
    outside, _ = plain(state, {}, {"image": batch["image"], "text": encode({"table": table}, ids, mask)})
    assert largest(inside.params, outside.params) < 1e-7


FAMILIES = {
    "unet": Flow(network=UNet(widths=(8, 16), down=(1, 1), up=(1, 1), head_dim=8)),
    "transformer": Flow(network=Transformer(patch=4, width=32, depth=2, head_dim=8)),
}


def run(family, mesh_config, name="adamw", steps=10, **settings):
    config = OptimizerConfig(name=name, learning_rate=1e-3, warmup_steps=2)
    optimizers = {"generator": make_optimizer(config, steps)}
    mesh = make_mesh(mesh_config, jax.devices()[: np.prod([mesh_config.data, mesh_config.fsdp, mesh_config.tensor])])
    make = lambda: create(family, SHAPES, optimizers, seed=0)  # noqa: E731
    where = shardings(jax.eval_shape(make), family.logical_axes(SHAPES), mesh)
    state = jax.jit(make, out_shardings=where)()
    step = on_mesh(mesh, make_step(family, optimizers, seed=0, **settings))
    step = jax.jit(step, donate_argnums=0, out_shardings=(where, replicated(mesh)))
    losses = []
    for i in range(steps):
        batch = jax.device_put(make_batch(seed=i), batch_sharding(mesh))
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mesh_changes_nothing(name):
    family = FAMILIES[name]
    state, losses = run(family, MeshConfig(1, 1, 1))
    for mesh in (MeshConfig(8, 1, 1), MeshConfig(2, 4, 1), MeshConfig(2, 2, 2)):
        other, other_losses = run(family, mesh)
        np.testing.assert_allclose(losses, other_losses, rtol=2e-6)
        assert largest(jax.device_get(state.params), jax.device_get(other.params)) <= 1e-5
    assert losses[-1] != losses[0]


def test_parameters_and_their_moments_are_split_over_the_mesh():
    state, _ = run(FAMILIES["transformer"], MeshConfig(2, 2, 2), steps=1)
    kernel = state.params["generator"]["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (16, 64)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if "'mlp'" in str(path) and "'up'" in str(path) and "'blocks'" in str(path) and "'kernel'" in str(path)
    ]
    assert len(moments) == 6  # two blocks and the text's, two moments each
    assert all(m.sharding.shard_shape(m.shape) == (m.shape[0] // 2, m.shape[1] // 2) for m in moments)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_learns(name):
    family = FAMILIES["unet"]
    batch = make_batch(seed=0)
    batch["image"] = np.broadcast_to(np.linspace(0, 255, 16, dtype=np.uint8)[None, :, None, None], (16, 16, 16, 3))
    optimizers = {"generator": make_optimizer(OptimizerConfig(name=name, learning_rate=3e-3, warmup_steps=5), 60)}
    state = create(family, SHAPES, optimizers, seed=0)
    step = jax.jit(make_step(family, optimizers, seed=0), donate_argnums=0)
    errors = []
    for _ in range(60):
        state, metrics = step(state, {}, batch)
        errors.append(float(metrics["clean_mse"]))
    assert np.mean(errors[-5:]) < 0.15 * np.mean(errors[:5])


def test_bfloat16_computes_and_keeps_float32_weights():
    state, losses = run(FAMILIES["transformer"], MeshConfig(1, 1, 1), steps=2, compute_dtype=jnp.bfloat16)
    _, exact = run(FAMILIES["transformer"], MeshConfig(1, 1, 1), steps=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses, exact, rtol=0.05)
    assert losses != exact


def test_schedules_have_the_stated_values():
    rate = lambda schedule, step: float(  # noqa: E731
        learning_rate(OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=10, decay_share=0.5), 110)(step)
    )
    for schedule in ("constant", "cosine", "linear", "trapezoid"):
        assert rate(schedule, 0) == pytest.approx(0.1)
        assert rate(schedule, 10) == pytest.approx(1.0)
    assert rate("constant", 109) == pytest.approx(1.0)
    assert rate("cosine", 60) == pytest.approx(0.5)
    assert rate("linear", 60) == pytest.approx(0.5)
    assert rate("trapezoid", 60) == pytest.approx(1.0)
    assert rate("trapezoid", 85) == pytest.approx(0.5)
    for schedule in ("cosine", "linear", "trapezoid"):
        assert rate(schedule, 110) == pytest.approx(0.0, abs=1e-6)


def test_decay_is_for_matrices_and_clipping_bounds_the_gradient():
    params = {"w": jnp.ones((4, 4)), "b": jnp.ones((4,))}
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05)
    np.testing.assert_allclose(updates["b"], 0.0)
    clipped = make_optimizer(OptimizerConfig(clip_norm=1.0), 10).init(params)
    assert len(clipped) == 2  # clipping stands before the optimizer
