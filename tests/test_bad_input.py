"""What a user, a disk or a file can do wrong: one line that says so, and nothing half-written."""

import contextlib
import functools
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import cv2
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxgen.model
import sample
from jaxgen.storage import as_path
from jaxgen.train.checkpoints import Checkpoints
from jaxgen.train.state import TrainState
from tests.train.runs import command, environment
from tests.train.test_run import assert_same
from tests.train.test_start import begin, call, refused, saved, site

# Where not even root may write: sysfs takes no new directories, and macOS seals its system.
FORBIDDEN = "/sys" if os.path.isdir("/sys") else "/System"
STEPS = ("--config.train.steps=8", "--config.train.checkpoint_every=2", "--config.optimizer.schedule=constant")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with site(tmp_path_factory.mktemp("bad")) as place:
        yield place


def run(place, name, limit=resource.RLIM_INFINITY):
    """train.py as a process that can write no file of more than `limit` bytes, as if the disk were full."""
    first = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    return subprocess.run(
        [sys.executable, "-c", f"{first}; os.execv(sys.argv[1], sys.argv[1:])", *command(place, name, *STEPS)],
        env=environment(place) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@contextlib.contextmanager
def full_disk(limit):
    """This process can write no file of more than `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def can_mount():
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(place):
    """A run that nothing disturbed, with checkpoints 4, 6 and 8."""
    done = run(place, "whole")
    assert done.returncode == 0, done.stderr
    return place / "whole"


# --- Disks ------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_a_full_disk_refuses_is_told_and_made_up_for(place, whole):
    workdir = place / "full"
    shutil.copytree(whole, workdir)
    for step in (6, 8):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    before = contents(workdir / "checkpoints" / "4")
    done = run(place, "full", limit=12_000)  # enough for metrics.jsonl
    assert done.returncode == 2
    assert "step 8/8" in done.stdout  # it went on
    *warnings, last = done.stderr.splitlines()
    assert len(warnings) == 2
    for line in warnings:
        assert line.startswith("warning: checkpoint not saved: ")
        assert f"{workdir}/checkpoints" in line
    assert last.startswith(f"error: the last checkpoint of {workdir} could not be written")
    assert saved(workdir) == [4]
    assert contents(workdir / "checkpoints" / "4") == before
    done = run(place, "full")
    assert (done.returncode, done.stderr) == (0, "")
    assert "from step 4 to 8" in done.stdout
    assert_same(workdir, whole)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["4", "6", "8"]


# A file system of its own with 24 kB left, then with room: a shell with arguments DISK BEGUN AFTER COMMAND…
SMALL = """
disk=$1; mount -t tmpfs -o size=8m none $disk; cp -r $2 $disk/run; after=$3; shift 3
head -c 9m /dev/zero > $disk/rest 2>&-; truncate -s -24k $disk/rest
"$@"; echo status $?; ls $disk/run/checkpoints
rm $disk/rest
"$@"; echo status $?
cp -r $disk/run $after
"""


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
def test_a_file_system_without_space_is_told_and_made_up_for(place, whole, tmp_path):
    """What fails here is ENOSPC, in the middle of files, and of all that a run writes."""
    begun, disk, after = (tmp_path / name for name in ("begun", "disk", "after"))
    shutil.copytree(whole, begun)
    disk.mkdir()
    for step in (6, 8):
        shutil.rmtree(begun / "checkpoints" / str(step))
    more = ("--config.train.log_every=1", "--config.sample.prompts=a", "--config.sample.every=6")
    train = [*command(place, "", *STEPS, *more), f"--workdir={disk / 'run'}"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", SMALL, "sh", *map(str, (disk, begun, after)), *train],
        env=environment(place) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.count("status 2\n") == 1, done.stdout + done.stderr
    full, space = done.stdout.split("status 2\n")
    assert "step 8/8" in full  # it went on
    assert space.startswith("4\n")  # nothing half-written is left beside the older checkpoint
    *warnings, last = done.stderr.splitlines()
    for what in ("checkpoint not saved", "metrics not written", "samples not written"):
        assert any(line.startswith(f"warning: {what}: no space left to write {disk}/run") for line in warnings)
    assert all(line.startswith("warning: ") for line in warnings)
    assert last.startswith(f"error: the last checkpoint of {disk}/run could not be written")
    assert "from step 4 to 8" in space
    assert space.endswith("status 0\n")
    assert_same(after, whole)


def fill(disk):
    """Checkpoints into a file system with ever more room. Wherever in a save it ends, the save fails once and whole."""
    params = {f"layer{i}": jnp.ones((30, 40)) for i in range(6)}
    state = TrainState(jnp.int32(0), params, params, (params, params), {"failed": jnp.int32(-1)})
    rest, failures = os.path.join(disk, "rest"), []
    for room in range(0, 240_000, 12_000):
        checkpoints = Checkpoints(as_path(os.path.join(disk, str(room))))
        save = lambda step, to=checkpoints: to.save(replace(state, step=jnp.int32(step)), {})  # noqa: E731
        save(1)
        assert (checkpoints.wait(), checkpoints.failed) == (True, False)
        space = os.statvfs(disk)
        with open(rest, "wb") as file:
            file.write(bytes(space.f_bavail * space.f_bsize - room))
        save(2)
        save(3)
        checkpoints.wait()
        failures.append(checkpoints.failed)
        os.remove(rest)
        save(4)
        assert (checkpoints.wait(), checkpoints.failed) == (True, False)
        checkpoints.close()
        left = os.listdir(checkpoints.directory)
        assert {"1", "4"} <= set(left) <= {"1", "2", "3", "4"}, (room, left)
        shutil.rmtree(checkpoints.directory)
    assert all(failures)


@pytest.mark.skipif(not can_mount(), reason="no file system can be mounted here")
def test_a_save_that_fails_leaves_nothing_to_the_next(tmp_path):
    first = "import sys; from tests.test_bad_input import fill; fill(sys.argv[1])"
    shell = 'mount -t tmpfs -o size=4m none $1; exec $2 -c "$3" $1'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", shell, "sh", str(tmp_path), sys.executable, first],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_disk_full_for_a_while_does_no_harm(place, monkeypatch):
    save = ocp.CheckpointManager.save

    def refusing(manager, step, **more):
        if step == 2:
            raise OSError(28, "No space left on device")
        return save(manager, step, **more)

    monkeypatch.setattr(ocp.CheckpointManager, "save", refusing)
    status, out, err = begin(place, "once", "--config.train.steps=4", "--config.train.checkpoint_every=2")
    assert status == 0
    assert f"warning: checkpoint not saved: no space left to write {place / 'once' / 'checkpoints'}: free some" in err
    assert "finished at step 4" in out
    assert saved(place / "once") == [4]


def test_a_disk_full_from_the_start_changes_nothing(place, whole):
    before = contents(whole)
    with full_disk(1000):
        line = refused(place, "whole", *STEPS, "--config.train.log_every=2")
    assert line.startswith(f"error: no space left to write {whole / 'config.json'}: free some")
    assert contents(whole) == before


def test_a_disk_full_while_preparing_leaves_no_part_of_a_set(place, tmp_path):
    with full_disk(500):
        line = refused(place, "unprepared", f"--config.data.dir={tmp_path}")
    assert line.startswith(f"error: no space left to write {tmp_path}/folder/")
    assert contents(tmp_path) == {}
    assert contents(place / "unprepared") == {}


def test_places_without_permission_are_told(place):
    for name, more, where in (
        (f"{FORBIDDEN}/jaxgen", [], f"{FORBIDDEN}/jaxgen:"),
        ("homeless", [f"--config.data.dir={FORBIDDEN}/jaxgen"], f"{FORBIDDEN}/jaxgen/folder/"),
    ):
        line = refused(place, name, *more)
        assert line.startswith(f"error: no permission to write {where}")
        assert line.endswith(": choose a directory of your own")
    assert contents(place / "homeless") == {}


# --- Text encoders ----------------------------------------------------------------------------------------------------


def test_a_language_model_without_a_tokenizer_is_told(place, tmp_path):
    shutil.copytree(place / "encoder", tmp_path / "encoder")
    (tmp_path / "encoder" / "tokenizer.json").unlink()
    line = refused(place, "mute", f"--config.text.source={tmp_path / 'encoder'}")
    assert line.startswith(f"error: {tmp_path / 'encoder'} has no tokenizer: tokenizer.json (or vocab.txt")
    assert contents(place / "mute") == {}


def test_weights_cut_short_are_told_by_both_scripts(place, whole, tmp_path):
    shutil.copytree(place / "encoder", tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    line = refused(place, "cut", f"--config.text.source={tmp_path / 'encoder'}")
    assert line.startswith(f"error: {file} is no whole safetensors file")
    assert contents(place / "cut") == {}
    shutil.copytree(whole, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(str(place / "encoder"), str(tmp_path / "encoder")))
    status, _, err = call(sample.main, f"--workdir={tmp_path / 'run'}", "--prompt=grey", f"--out={tmp_path / 'grid.png'}")
    assert status == 2
    assert err.startswith(f"error: {file} is no whole safetensors file")
    assert err.count("\n") == 1
    assert not (tmp_path / "grid.png").exists()


# --- Drawing ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draw(whole):
    """sample.py in this process with few steps; the model is loaded and compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxgen.model, "load", functools.cache(jaxgen.model.load))
        yield lambda *more: call(sample.main, f"--workdir={whole}", "--num_images=1", "--steps=1", *more)


def test_pictures_for_a_full_disk_leave_no_part_of_a_file(draw, tmp_path):
    for more, file in ((f"--out={tmp_path / 'grid.png'}", "grid.png"), (f"--out_dir={tmp_path / 'all'}", "all/0000.png")):
        with full_disk(100):
            status, _, err = draw("--prompt=grey", more)
        assert status == 2
        assert err == f"error: no space left to write {tmp_path / file}: free some, or choose another directory\n"
        assert contents(tmp_path) == {}
    (tmp_path / "grid.png").write_bytes(b"the old one")
    with full_disk(100):
        assert draw("--prompt=grey", f"--out={tmp_path / 'grid.png'}")[0] == 2
    assert contents(tmp_path) == {"grid.png": b"the old one"}


def test_pictures_for_a_place_without_permission_are_refused(draw):
    status, _, err = draw("--prompt=grey", f"--out={FORBIDDEN}/grid.png")
    assert status == 2
    assert err == f"error: no permission to write {FORBIDDEN}/grid.png: choose a directory of your own\n"


def test_settings_that_mean_nothing_are_refused(draw):
    for flag, line in (
        ("--sampler=magic", "unknown sampler 'magic': this model has "),
        ("--temperature=-1", "temperature=-1.0 and top_k=0 cannot be negative"),
        ("--top_p=0", "top_p=0.0 must lie in (0, 1]"),
    ):
        status, _, err = draw("--prompt=grey", flag)
        assert status == 2
        assert err.startswith("error: ")
        assert line in err
        assert err.count("\n") == 1


def test_a_prompt_that_is_too_long_is_told_cut_and_drawn(draw, tmp_path):
    # 32 tokens, two of them special: the first 30 words count.
    pictures = []
    for name, words, warned in (("long", 50, True), ("cut", 30, False), ("short", 3, False)):
        status, _, err = draw(f"--prompt={' '.join(['grey'] * words)}", f"--out_dir={tmp_path / name}")
        assert status == 0
        pictures.append(cv2.imread(str(tmp_path / name / "0000.png")))
        assert warned == ("only the first 32 count" in err)
        assert err.count("\n") == warned
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()
