import dataclasses
import errno

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.errors import UserError
from jaxgen.parallel.mesh import MeshConfig, make_mesh
from jaxgen.storage import as_path
from jaxgen.train.checkpoints import Checkpoints
from jaxgen.train.state import create, shardings
from tests.train.test_step import SHAPES
from tests.train.toy import Toy


def layout(devices, tensor=1):
    """(abstract state, function that makes one) on a mesh of some devices."""
    family, optimizers = Toy(second=True), {"first": optax.adam(0.1), "second": optax.sgd(0.1, momentum=0.9)}
    mesh = make_mesh(MeshConfig(-1, 1, tensor), jax.devices()[:devices])
    make = lambda: create(family, SHAPES, optimizers, seed=0)  # noqa: E731
    abstract = jax.eval_shape(make)
    where = shardings(abstract, family.logical_axes(SHAPES), mesh)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, where)
    return abstract, jax.jit(make, out_shardings=where)


def at(state, step):
    grown = jax.tree.map(lambda p: p + step if p.dtype == jnp.float32 else p, state)
    return dataclasses.replace(grown, step=jnp.int32(step))


def test_a_state_comes_back_whole_on_other_devices(tmp_path):
    _, make = layout(8, tensor=2)
    state = at(make(), 5)
    checkpoints = Checkpoints(as_path(tmp_path))
    checkpoints.save(state, {"note": "kept"})
    assert checkpoints.wait()
    for devices in (1, 4, 8):
        abstract, _ = layout(devices)
        restored, meta = Checkpoints(as_path(tmp_path)).restore(abstract)
        assert (int(restored.step), meta["note"], meta["step"]) == (5, "kept", 5)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, abstract))
    ema, _ = Checkpoints(as_path(tmp_path), keep=None).restore_ema()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ema), jax.device_get(state.ema_params))


def test_the_last_and_the_best_are_kept(tmp_path):
    state = layout(1)[1]()
    checkpoints = Checkpoints(as_path(tmp_path), keep=2, score=lambda metrics: -metrics["loss"])
    for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0], start=1):
        checkpoints.save(at(state, step), {}, {"loss": loss})
    checkpoints.save(at(state, 6), {})
    checkpoints.close()
    assert Checkpoints(as_path(tmp_path), keep=None).steps() == [2, 5, 6]


def test_a_failed_state_is_never_written(tmp_path):
    state = layout(1)[1]()
    failed = dataclasses.replace(state, control={"failed": jnp.int32(4)})
    with pytest.raises(ValueError, match="step 4 was not finite"):
        Checkpoints(as_path(tmp_path)).save(failed, {})


def test_nothing_readable_is_an_error_and_nothing_at_all_is_none(tmp_path):
    abstract, make = layout(1)
    assert Checkpoints(as_path(tmp_path)).restore(abstract) is None
    checkpoints = Checkpoints(as_path(tmp_path))
    checkpoints.save(make(), {})
    checkpoints.close()
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="can be read"):
        Checkpoints(as_path(tmp_path)).restore(abstract)


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path, capfd, monkeypatch):
    abstract, make = layout(1)
    checkpoints = Checkpoints(as_path(tmp_path))
    checkpoints.save(at(make(), 1), {})
    assert checkpoints.wait()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    checkpoints.save(at(make(), 2), {})
    assert checkpoints.failed
    assert "no space left to write" in capfd.readouterr().err
    restored, _ = Checkpoints(as_path(tmp_path)).restore(abstract)
    assert int(restored.step) == 1
