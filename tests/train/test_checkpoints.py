import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgen.errors import UserError
from jaxgen.parallel.mesh import MeshConfig, make_mesh
from jaxgen.storage import as_path
from jaxgen.train import checkpoints as checkpoints_module
from jaxgen.train.checkpoints import Checkpoints, read_config
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
        assert (int(restored.step), meta) == (5, {"note": "kept", "step": 5, "format": 1})
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
        assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, restored, abstract))
    ema, meta = Checkpoints(as_path(tmp_path), keep=None).restore_ema()
    assert meta["step"] == 5
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ema), jax.device_get(state.ema_params))


@pytest.mark.parametrize(("size", "shared"), [(checkpoints_module.SHARED_BYTES, False), (1, True)])
def test_devices_share_the_writing_of_large_arrays_alone(tmp_path, monkeypatch, size, shared):
    """Sharing means cutting, for which programs are compiled."""
    monkeypatch.setattr(checkpoints_module, "SHARED_BYTES", size)
    abstract, make = layout(8)
    state, compiled = make(), []
    note = lambda event, *_, **__: compiled.append("backend_compile" in event)  # noqa: E731
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(note)
    checkpoints = Checkpoints(as_path(tmp_path))
    checkpoints.save(state, {})
    assert checkpoints.wait()
    jax.monitoring.unregister_event_duration_listener(note)
    assert any(compiled) == shared
    restored, _ = Checkpoints(as_path(tmp_path)).restore(abstract)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_the_last_and_the_best_are_kept(tmp_path):
    state = layout(1)[1]()
    checkpoints = Checkpoints(as_path(tmp_path), keep=2, score=lambda metrics: -metrics["loss"])
    for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0], start=1):
        checkpoints.save(at(state, step), {}, {"loss": loss})
    for step in (6, 7, 8):
        checkpoints.save(at(state, step), {})
    checkpoints.close()
    assert Checkpoints(as_path(tmp_path), keep=None).steps() == [2, 7, 8]


def test_three_are_kept_where_nothing_is_said(tmp_path):
    state = layout(1)[1]()
    checkpoints = Checkpoints(as_path(tmp_path))
    for step in (1, 2, 3, 4, 5):
        checkpoints.save(at(state, step), {}, {"loss": 1.0})
    checkpoints.close()
    assert Checkpoints(as_path(tmp_path), keep=None).steps() == [3, 4, 5]


def test_a_relative_directory_is_as_good(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints(as_path("runs/here"))
    checkpoints.save(at(layout(1)[1](), 1), {})
    assert checkpoints.wait()
    assert (tmp_path / "runs" / "here" / "checkpoints" / "1").is_dir()
    assert Checkpoints(as_path("runs/here"), keep=None).restore_ema()[1]["step"] == 1


def test_a_step_is_written_once(tmp_path, capfd):
    state = layout(1)[1]()
    checkpoints = Checkpoints(as_path(tmp_path))
    for note in ("first", "second"):
        checkpoints.save(at(state, 1), {"note": note})
    assert checkpoints.wait()
    assert not checkpoints.failed
    assert checkpoints.restore_ema()[1]["note"] == "first"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("step", [0, 4])
def test_a_failed_state_is_never_written(tmp_path, step):
    state = layout(1)[1]()
    failed = dataclasses.replace(state, control={"failed": jnp.int32(step)})
    with pytest.raises(ValueError, match=f"step {step} was not finite"):
        Checkpoints(as_path(tmp_path)).save(failed, {})
    assert Checkpoints(as_path(tmp_path), keep=None).steps() == []


def damage(tmp_path, step):
    for file in (tmp_path / "checkpoints" / str(step)).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def test_a_damaged_newest_one_is_passed_over_and_written_anew(tmp_path, capfd):
    abstract, make = layout(1)
    checkpoints = Checkpoints(as_path(tmp_path), keep=5)
    for step in (1, 2, 3, 4):
        checkpoints.save(at(make(), step), {})
    checkpoints.close()
    for step in (3, 4):
        damage(tmp_path, step)
    # Whoever only reads leaves everything as it is.
    assert Checkpoints(as_path(tmp_path), keep=None).restore_ema()[1]["step"] == 2
    assert Checkpoints(as_path(tmp_path), keep=None).steps() == [1, 2, 3, 4]
    capfd.readouterr()
    checkpoints = Checkpoints(as_path(tmp_path), keep=5)
    restored, meta = checkpoints.restore(abstract)
    told = capfd.readouterr().err
    assert (int(restored.step), meta["step"]) == (2, 2)
    assert "checkpoint 4 in" in told
    assert "going back to checkpoint 2" in told
    assert checkpoints.steps() == [1, 2]
    checkpoints.save(at(make(), 3), {"note": "anew"})
    checkpoints.close()
    restored, meta = Checkpoints(as_path(tmp_path)).restore(abstract)
    assert (int(restored.step), meta["note"]) == (3, "anew")
    assert capfd.readouterr().err == ""


def test_what_a_kill_left_half_written_is_removed_and_never_by_a_reader(tmp_path):
    left = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    (left / "params").mkdir(parents=True)
    assert Checkpoints(as_path(tmp_path), keep=None).steps() == []
    assert left.exists()  # it may be a save under way
    checkpoints = Checkpoints(as_path(tmp_path))
    assert checkpoints.steps() == []
    checkpoints.save(at(layout(1)[1](), 8), {})
    assert checkpoints.wait()
    assert not left.exists()


def test_a_configuration_is_read_or_told(tmp_path):
    assert read_config(as_path(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))
    assert read_config(as_path(tmp_path)) == {"seed": 3}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        read_config(as_path(tmp_path))


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

    assert not checkpoints.failed
    monkeypatch.setattr(checkpoints._manager, "save", full)
    checkpoints.save(at(make(), 2), {})
    assert checkpoints.failed
    assert not checkpoints.failed  # told once
    assert "no space left to write" in capfd.readouterr().err
    restored, _ = Checkpoints(as_path(tmp_path)).restore(abstract)
    assert int(restored.step) == 1


@pytest.mark.parametrize(
    ("error", "cause", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), None, "no space left to write"),
        (ValueError("a thread ended"), OSError(errno.EACCES, "Permission denied"), "no permission to write"),
        (ValueError("the disk is\nodd"), KeyError("x"), "checkpoints: the disk is"),
        (RuntimeError(), None, "RuntimeError"),
    ],
)
def test_a_save_that_ends_badly_later_is_told(tmp_path, capfd, monkeypatch, error, cause, told):
    checkpoints = Checkpoints(as_path(tmp_path))
    assert checkpoints.wait() is True

    def late():
        raise error from cause

    monkeypatch.setattr(checkpoints, "_writers", [late])
    assert checkpoints.wait() is False
    assert checkpoints.failed
    assert told in capfd.readouterr().err
    checkpoints.close()
    assert told in capfd.readouterr().err
