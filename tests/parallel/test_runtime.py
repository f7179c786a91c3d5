import gc
import http.server
import os
import platform
import subprocess
import sys
import threading
import time
import weakref
import zlib

import jax
import jax.numpy as jnp
import pytest

from jaxgen.errors import UserError
from jaxgen.parallel import runtime
from jaxgen.parallel.runtime import steady_memory


def test_processes_are_taken_from_the_environment():
    names = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert runtime.multi_host(names) == {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}
    assert runtime.multi_host({}) is None
    assert runtime.multi_host({"TPU_WORKER_HOSTNAMES": "one"}) is None
    assert runtime.multi_host({"TPU_WORKER_HOSTNAMES": "one,two"}) == {}
    assert runtime.multi_host({"SLURM_NTASKS": "4"}) == {}
    with pytest.raises(UserError, match="JAX_PROCESS_ID is not"):
        runtime.multi_host({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"})


def test_half_written_programs_are_taken_away_and_whole_ones_looked_at_once(tmp_path, monkeypatch):
    whole = zlib.compress(os.urandom(10_000))
    contents = {"whole": whole, "part": whole[:-100], "empty": b"", "spoilt": whole[:50] + bytes(100) + whole[150:]}
    contents["zstd"] = b"\x28..."  # not known: left alone
    for name, content in contents.items():
        (tmp_path / f"{name}-cache").write_bytes(content)
    (tmp_path / "part-atime").write_bytes(b"1")
    runtime.sweep_programs(tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*-*")) == ["part-atime", "whole-cache", "zstd-cache"]
    later = time.time() + 60
    (tmp_path / "new-cache").write_bytes(whole[:-1])
    os.utime(tmp_path / "new-cache", (later, later))
    seen = []
    real = runtime.is_whole
    monkeypatch.setattr(runtime, "is_whole", lambda content: seen.append(content) or real(content))
    os.utime(tmp_path / "whole-cache", (1, 1))
    os.utime(tmp_path / "zstd-cache", (1, 1))
    runtime.sweep_programs(tmp_path)
    assert seen == [whole[:-1]]
    assert not (tmp_path / "new-cache").exists()
    runtime.sweep_programs(tmp_path / "not there")
    assert not (tmp_path / "not there").exists()


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


def test_workers_of_a_tpu_slice_are_counted_from_the_metadata():
    told = {
        "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '3'\n",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            known = name in told and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(told[name].encode() if known else b"<html>")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://localhost:{server.server_port}/computeMetadata/v1/instance/"
    try:
        assert runtime.tpu_workers(address) == 6
        del told["tpu-env"]
        assert runtime.tpu_workers(address) == 2
        told.clear()  # any other machine there
        assert runtime.tpu_workers(address) == 1
    finally:
        server.shutdown()


def test_google_clouds_machines_are_known(tmp_path):
    assert not runtime.on_google_cloud(tmp_path)
    (tmp_path / "sys/class/dmi/id").mkdir(parents=True)
    (tmp_path / "sys/class/dmi/id/product_name").write_text("Google Compute Engine\n")
    assert runtime.on_google_cloud(tmp_path)


def test_the_end_of_another_process_is_told_from_an_error_of_this_one():
    lost = (
        "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:538] Read error: Connection reset by peer"
    )
    assert runtime.lost_peer(jax.errors.JaxRuntimeError(lost))
    assert not runtime.lost_peer(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes."))
    assert not runtime.lost_peer(ValueError("Gloo"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_memory_that_is_taken_again_is_not_cleared_again():
    """In a thread of its own, as XLA takes a program's temporary memory."""
    program = """
import resource, sys, threading
import numpy as np
from jaxgen.parallel.runtime import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
faults = []
def take():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.full(25_000_000, 1.0, np.float32)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=take)
thread.start()
thread.join()
print(*faults)
"""

    def faults(how: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    kept, given_back = faults("kept"), faults("given back")
    assert max(kept[1:]) < 10 < min(given_back[1:])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told")
def test_kept_memory_is_given_back_when_that_is_asked():
    program = """
import numpy as np
from jaxgen.parallel.runtime import keep_memory, trim_memory
keep_memory()
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1000
def take():
    below = np.full(25_000_000, 1.0, np.float32)
    above = np.full(1000, 1.0, np.float32)  # is still used, so that what is below it lies in the middle of the heap
    return above
before = resident()
above = take()
kept = resident()
trim_memory()
print(kept - before, resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept > 90 > 10 > after  # MB


def test_a_loop_has_its_own_garbage_collected():
    class Ring:
        def __init__(self):
            self.own = self

    gone, kept, before = [], Ring(), Ring()
    weakref.finalize(before, gone.append, "before")
    del before

    def loop():
        with steady_memory():
            assert gone == ["before"]
            assert gc.get_freeze_count() > 10_000  # all that has been imported
            assert not any(found is kept for found in gc.get_objects())
            raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert gc.get_freeze_count() == 0
    assert any(found is kept for found in gc.get_objects())
