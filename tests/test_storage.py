import os
import resource
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from jaxgen.errors import NoSpace, UserError
from jaxgen.storage import as_path, read_json, sweep, write_arrays, write_bytes, write_json


def test_a_file_is_replaced_whole(tmp_path):
    file = as_path(tmp_path / "deep" / "a.json")
    write_json(file, {"a": 1})
    write_json(file, {"b": "é"})
    assert read_json(file) == {"b": "é"}
    assert os.listdir(tmp_path / "deep") == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    file = as_path(tmp_path / "a")
    write_bytes(file, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space left"):
        write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    write_bytes(as_path(tmp_path / "a"), b"old")
    (tmp_path / ".hidden").write_text("somebody's")
    (tmp_path / "score.part").write_text("somebody's")
    writer = f"""
import os, signal
from jaxgen.storage import as_path, writing
with writing(as_path({str(tmp_path / "a")!r})) as file:
    file.write(b"ne")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", writer]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 4
    sweep(as_path(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a", "score.part"]
    assert (tmp_path / "a").read_bytes() == b"old"
    sweep(as_path(tmp_path / "nothing"))


@pytest.mark.parametrize("transposed", [False, True])
def test_an_array_is_written_without_a_copy_of_it(tmp_path, transposed):
    value = np.random.default_rng(0).normal(size=(3000, 1000))
    value = value.T if transposed else value
    tracemalloc.start()
    write_arrays(as_path(tmp_path / "a.npy"), value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.8 * value.nbytes
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), value)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(NoSpace, match="no space left to write"):
            write_arrays(as_path(tmp_path / "a.npy"), value + 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), value)
    assert os.listdir(tmp_path) == ["a.npy"]


def test_json_that_is_missing_or_broken_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(as_path(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        read_json(as_path(tmp_path / "broken.json"))
