import dataclasses
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.parallel import kept
from jaxgen.parallel.kept import KeptProgram, hits
from jaxgen.parallel.mesh import make_mesh
from jaxgen.train.config import RunConfig, TrainConfig

CONFIG = RunConfig(family=Flow(), data=DataConfig(), train=TrainConfig())
FROM = {"family": {"type": "flow"}, "seed": 0}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv(kept.SWITCH, "1")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    compilation_cache.reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


def arguments(mesh, axis="data", size=8):
    return jax.device_put({"w": jnp.arange(float(size))}, NamedSharding(mesh, PartitionSpec(axis)))


def joined():
    """Not every thread: what other tests of this process used may keep idle ones to its end."""
    for thread in threading.enumerate():
        if thread.name == kept.THREADS:
            thread.join()


@pytest.fixture
def kept_one(cache):
    """A mesh of all devices, and the program of a step there, kept with the mark "a"."""
    mesh = make_mesh(CONFIG.mesh)
    given = arguments(mesh)
    program = jax.jit(lambda x: {"w": 2 * x["w"] + 1}, donate_argnums=0).lower(given).compile()
    KeptProgram(CONFIG, mesh, FROM).keep(program, (given,), "a")
    joined()
    assert len(list(cache.glob("step-*"))) == 1
    return mesh


def test_what_is_kept_computes_the_same_and_takes_its_arguments_over(kept_one):
    found, given = KeptProgram(CONFIG, kept_one, FROM), arguments(kept_one)
    program = found.get((given,), "a")
    made = program(given)
    np.testing.assert_array_equal(made["w"], 2.0 * np.arange(8) + 1)
    assert made["w"].sharding == arguments(kept_one)["w"].sharding
    assert given["w"].is_deleted()
    assert found.get((arguments(kept_one),), "a") is None  # once: other shapes of batch are compiled


def test_nothing_is_found_for_anything_else(kept_one, monkeypatch):
    mesh, same = kept_one, arguments(kept_one)
    asked = lambda *given, mesh=mesh, fields=FROM, config=CONFIG: KeptProgram(config, mesh, fields).get(*given)  # noqa: E731
    assert asked((same,), "a") is not None
    assert asked((same,), "b") is None
    assert asked((arguments(mesh, size=16),), "a") is None
    assert asked((arguments(mesh, axis=None),), "a") is None
    assert asked((jax.tree.map(lambda x: x.astype(jnp.int32), same),), "a") is None
    assert asked(({"v": same["w"]},), "a") is None
    assert asked((same,), "a", fields=FROM | {"seed": 1}) is None
    fewer = make_mesh(dataclasses.replace(CONFIG.mesh, data=len(jax.devices()) // 2))
    assert asked((arguments(fewer),), "a", mesh=fewer) is None
    with jax.default_matmul_precision("float32"):
        assert asked((same,), "a") is None
    monkeypatch.setattr(kept, "PACKAGES", ("jax",))  # stands for other versions of them
    assert asked((same,), "a") is None
    monkeypatch.undo()
    monkeypatch.setenv(kept.SWITCH, "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    assert asked((same,), "a") is None
    monkeypatch.setenv(kept.SWITCH, "0")
    monkeypatch.delenv("XLA_FLAGS")
    assert asked((same,), "a") is None


def test_sources_are_part_of_the_question(kept_one, tmp_path, monkeypatch):
    """A copy of the package in which one line is changed."""
    package = Path(kept.__file__).parents[1]
    shutil.copytree(package, tmp_path / "jaxgen", ignore=shutil.ignore_patterns("models", "__pycache__"))
    monkeypatch.setattr(kept, "__file__", str(tmp_path / "jaxgen" / "parallel" / "kept.py"))
    assert KeptProgram(CONFIG, kept_one, FROM).get((arguments(kept_one),), "a") is not None
    with (tmp_path / "jaxgen" / "nn" / "layers.py").open("a") as file:
        file.write("# another\n")
    assert KeptProgram(CONFIG, kept_one, FROM).get((arguments(kept_one),), "a") is None


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:100], lambda data: b"", lambda data: b"x" * 2000]
)
def test_a_damaged_one_is_made_anew(kept_one, cache, damage):
    (file,) = cache.glob("step-*")
    file.write_bytes(damage(file.read_bytes()))
    assert KeptProgram(CONFIG, kept_one, FROM).get((arguments(kept_one),), "a") is None


def test_classes_of_others_keep_nothing(cache):
    @dataclasses.dataclass(frozen=True)
    class Mine(Flow):
        pass

    mesh = make_mesh(CONFIG.mesh)
    assert kept.place(CONFIG, FROM) is not None
    assert kept.place(dataclasses.replace(CONFIG, family=Mine()), FROM) is None
    KeptProgram(dataclasses.replace(CONFIG, family=Mine()), mesh, FROM).keep(None, (arguments(mesh),))
    joined()
    assert not list(cache.iterdir())


def test_a_program_that_jax_has_from_its_cache_is_told_in_its_own_thread(cache):
    """XLA writes such a one without its functions."""
    limit = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def compiled(_):
        with hits() as read:
            jax.jit(lambda x: jnp.sin(x) * 3.25).lower(np.ones(5, np.float32)).compile()
        return len(read)

    try:
        assert compiled(0) == 0
        jax.clear_caches()
        with hits() as here, ThreadPoolExecutor(1) as other:
            assert list(other.map(compiled, [0])) == [1]
        assert not here
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", limit)
