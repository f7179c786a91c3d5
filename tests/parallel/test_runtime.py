import jax
import jax.numpy as jnp
import pytest

from jaxgen.errors import UserError
from jaxgen.parallel import runtime


def test_processes_are_taken_from_the_environment():
    names = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert runtime.multi_host(names) == {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert runtime.multi_host({}) is None
    assert runtime.multi_host({"TPU_WORKER_HOSTNAMES": "one"}) is None
    assert runtime.multi_host({"TPU_WORKER_HOSTNAMES": "one,two"}) == {}
    assert runtime.multi_host({"SLURM_NTASKS": "4"}) == {}
    with pytest.raises(UserError, match="JAX_PROCESS_ID is not"):
        runtime.multi_host({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"})


def test_an_accelerator_that_jax_does_not_see_is_told(tmp_path):
    assert runtime.unseen_accelerator({}, tmp_path) is None
    assert "--extra tpu" in runtime.unseen_accelerator({"TPU_NAME": "v5e"}, tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    told = runtime.unseen_accelerator({}, tmp_path)
    assert "--extra cuda" in told
    assert "--allow_cpu" in told
    assert runtime.unseen_accelerator({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) is None


def test_the_first_line_says_where_and_how():
    line = runtime.describe(jnp.bfloat16)
    assert line == f"jax {jax.__version__} on cpu (cpu) × 8 devices, 1 process, computing in bfloat16"
    assert runtime.compute_dtype("auto") == jnp.float32
    with pytest.raises(UserError, match="one of auto"):
        runtime.compute_dtype("float16")


def test_what_is_missing_is_named_with_the_command():
    runtime.require(("jax",), "train")
    with pytest.raises(UserError, match=r"nosuchpackage is not installed: run `uv sync --extra train`|jaxgen\[train\]"):
        runtime.require(("jax", "nosuchpackage"), "train")
