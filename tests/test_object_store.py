"""A run whose workdir and data lie in an object store, which can neither append to an object nor rename one."""

import glob
import io
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from etils.epath import gpath, stat_utils
from etils.epath.backend import Backend
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint._src.path import gcs_utils

import jaxgen
from jaxgen import storage
from jaxgen.data.config import DataConfig
from jaxgen.errors import UserError
from jaxgen.evaluate.pictures import save_png
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.nn.module import flatten
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.storage import as_path, write_text
from jaxgen.train import fit, loop
from jaxgen.train.config import EvalConfig, RunConfig, SampleConfig, TrainConfig
from jaxgen.train.goodput import TOLD

PROMPTS = ("shade 3", "shade 30")
CLOCK = ("step_ms", "images_per_sec", "gflops", "compile_s", "startup_s", "peak_memory_bytes", *TOLD)


class Upload(io.BytesIO):
    """An object is there, whole, once it is closed; not before."""

    def __init__(self, file: Path):
        super().__init__()
        self._file = file

    def close(self):
        if not self.closed:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_bytes(self.getvalue())
        super().close()


class Store(Backend):
    """gs://BUCKET/NAME kept as root/BUCKET/NAME, with the manners of an object store.

    There are no directories: one seems to be there while an object's name begins so. What such a store cannot do is
    refused and noted."""

    def __init__(self, root: Path):
        self.root, self.refused, self.written = root, [], []

    def local(self, path) -> Path:
        path = os.fspath(path)
        assert path.startswith("gs://"), path
        return self.root / path.removeprefix("gs://")

    def refuse(self, what: str):
        self.refused.append(what)
        raise OSError(f"an object store cannot {what}")

    def open(self, path, mode):
        if mode in ("r", "rb"):
            file = io.BytesIO(self.local(path).read_bytes())
        elif mode in ("w", "wb"):
            self.written.append(os.fspath(path))
            file = Upload(self.local(path))
        else:
            self.refuse(f"open {path} with mode {mode}")
        return file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8")

    def exists(self, path):
        return self.local(path).is_file() or self.isdir(path)

    def isdir(self, path):
        return any(file.is_file() for file in self.local(path).rglob("*"))

    def listdir(self, path):
        if not self.isdir(path):
            raise FileNotFoundError(path)
        return [p.name for p in self.local(path).iterdir() if self.exists(f"{path}/{p.name}")]

    def glob(self, path):
        return [f"gs://{Path(found).relative_to(self.root)}" for found in glob.glob(os.fspath(self.local(path)))]

    def walk(self, top, *, top_down=True, on_error=None):
        for directory, names, files in os.walk(self.local(top), topdown=top_down, onerror=on_error):
            yield f"gs://{Path(directory).relative_to(self.root)}", names, files

    def makedirs(self, path, *, exist_ok=False, mode=None):
        self.mkdir(path, exist_ok=exist_ok, mode=mode)

    def mkdir(self, path, *, exist_ok=False, mode=None):
        assert mode in (None, 0o777), mode
        if self.local(path).is_file() or (self.isdir(path) and not exist_ok):
            raise FileExistsError(path)

    def rmtree(self, path):
        if not self.exists(path):
            raise FileNotFoundError(path)
        self.remove(path) if self.local(path).is_file() else shutil.rmtree(self.local(path))

    def remove(self, path):
        self.local(path).unlink()

    def rename(self, path, dst):
        self.refuse(f"rename {path} to {dst}")

    def replace(self, path, dst):
        self.refuse(f"rename {path} to {dst}")

    def copy(self, path, dst, overwrite):
        with self.open(path, "rb") as source, self.open(dst, "wb") as target:
            target.write(source.read())

    def stat(self, path):
        if self.isdir(path):
            return stat_utils.StatResult(is_directory=True, length=0, mtime=0, owner=None, group=None, mode=None)
        found = self.local(path).stat()
        return stat_utils.StatResult(
            is_directory=False, length=found.st_size, mtime=int(found.st_mtime), owner=None, group=None, mode=None
        )


def connect(patch, store):
    """gs:// is the store, and needs no package."""
    patch.setattr(storage, "DRIVERS", {})
    patch.setattr(gpath, "_is_tf_installed", lambda: False)
    patch.setitem(gpath._PREFIX_TO_BACKEND, "gs", store)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory; what one of its runs has compiled the others take from there, as separate commands do."""
    place = tmp_path_factory.mktemp("place")
    settings = {"jax_compilation_cache_dir": str(place / "xla"), "jax_persistent_cache_min_compile_time_secs": 0.1}
    before = {name: getattr(jax.config, name) for name in settings}

    def configure(some):
        compilation_cache.reset_cache()
        for name, value in some.items():
            jax.config.update(name, value)

    configure(settings)
    yield place
    configure(before)


@pytest.fixture(scope="module")
def store(place):
    """Connected. Orbax's array files, which never pass through etils, are sent below the same directory."""
    store = Store(place / "objects")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, store)
        patch.setattr(gcs_utils, "get_kvstore_for_gcs", lambda path: {"driver": "file", "path": str(store.local(path))})
        patch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
        patch.setenv("HOME", str(place / "home"))
        yield store
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pictures(root):
    """Forty, each of one shade of grey; three of them are kept for validation."""
    for number in range(40):
        save_png(as_path(f"{root}/pictures/{number}.png"), np.full((16, 16, 3), 6 * number, np.uint8), {})
        write_text(as_path(f"{root}/pictures/{number}.txt"), f"shade {number}")


def train(root, name="run", stop_at=None, **more):
    """Learn root/pictures; with `stop_at`, SIGTERM comes while that step is being told."""
    config = RunConfig(
        family=Flow(network=UNet(widths=(8,), down=(1,), up=(1,), attention=("none",), head_dim=8, dropout=0.1)),
        data=DataConfig(name=f"folder:{root}/pictures", image_size=16, dir=f"{root}/data"),
        mesh=MeshConfig(data=1, fsdp=2),
        train=TrainConfig(**{"steps": 8, "batch_size": 8, "log_every": 1, "checkpoint_every": 2, "keep_checkpoints": 2} | more),
        sample=SampleConfig(prompts=PROMPTS, every=4, num_steps=3),
        eval=EvalConfig(every=4, count=8),
    )
    tell = fit.tell

    def tell_and_stop(line):
        tell(line)
        if line.startswith(f"step {stop_at}/"):
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "tell", tell_and_stop)
        loop.run(config, as_path(f"{root}/{name}"))


@pytest.fixture(scope="module")
def disk(place, store):
    root = str(place / "disk")
    pictures(root)
    train(root)
    return root


@pytest.fixture(scope="module")
def bucket(place, store):
    """The same, stopped after a few steps and gone on with on a host that has nothing of it."""
    pictures("gs://bucket")
    train("gs://bucket", stop_at=4)
    shutil.rmtree(place / "home")
    train("gs://bucket")
    return "gs://bucket"


def measured(root, name="run"):
    """What metrics.jsonl says beside the clock."""
    lines = [json.loads(line) for line in as_path(f"{root}/{name}/metrics.jsonl").read_text().splitlines()]
    lines = [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]
    return [line for line in lines if len(line) > 1]


def weights(path):
    return {name: np.asarray(leaf) for name, leaf in flatten(jaxgen.load(path).params)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def names(directory):
    return sorted(path.name for path in as_path(directory).iterdir())


def test_the_store_of_these_tests_refuses_what_object_stores_cannot(tmp_path, monkeypatch):
    store = Store(tmp_path)
    connect(monkeypatch, store)
    file = as_path("gs://bucket/a/file")
    file.parent.mkdir(parents=True, exist_ok=True)
    assert not file.parent.exists()
    file.write_text("whole")
    assert (file.read_text(), file.parent.is_dir(), names("gs://bucket")) == ("whole", True, ["a"])
    for attempt in (lambda: file.open("a"), lambda: file.rename("gs://bucket/b"), lambda: file.replace("gs://bucket/b")):
        with pytest.raises(OSError, match="object store cannot"):
            attempt()
    assert len(store.refused) == 3


def test_a_run_in_an_object_store_is_the_run_on_a_disk(store, disk, bucket):
    assert measured(bucket) == measured(disk)
    assert [line["step"] for line in measured(bucket) if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in measured(bucket) if "eval/loss" in line] == [4, 8]
    assert_same(weights(f"{bucket}/run"), weights(f"{disk}/run"))
    assert store.refused == []


def test_all_of_a_run_is_in_the_store(store, disk, bucket):
    assert names(f"{bucket}/run") == ["checkpoints", "config.json", "metrics.jsonl", "samples", "tensorboard"]
    for name in names(f"{bucket}/run/samples"):
        ours, theirs = (as_path(f"{root}/run/samples/{name}").read_bytes() for root in (bucket, disk))
        assert ours == theirs
    assert names(f"{bucket}/run/samples") == ["step_0000004.png", "step_0000008.png"]
    steps = [name for name in names(f"{bucket}/run/checkpoints") if name.isdigit()]
    assert steps == [name for name in names(f"{disk}/run/checkpoints") if name.isdigit()]
    for step in steps:
        assert as_path(f"{bucket}/run/checkpoints/{step}/commit_success.txt").exists()
    events = [as_path(f"{bucket}/run/tensorboard/{name}").read_bytes() for name in names(f"{bucket}/run/tensorboard")]
    assert len(events) == 2  # of the run that was stopped and of the one that went on
    assert all(b"train/loss" in data and b"samples" in data for data in events)
    assert "dataset_info.json" in {Path(name).name for name in store.written if name.startswith(f"{bucket}/data/folder")}


def test_a_model_is_read_from_the_store_and_exported_to_it(store, disk, bucket):
    jaxgen.export(f"{bucket}/run", f"{bucket}/exported", dtype="float32")
    assert names(f"{bucket}/exported") == ["README.md", "config.json", "model.safetensors"]
    paths = (f"{disk}/run", f"{bucket}/run", f"{bucket}/exported")
    local, *remote = (jaxgen.load(path).sample(PROMPTS, num_images=2, num_steps=3, seed=1) for path in paths)
    for images in remote:
        np.testing.assert_array_equal(images, local)
    assert store.refused == []


def test_a_checkpoint_cut_short_is_passed_over(store, disk, bucket):
    """Without renaming, a half-written checkpoint bears its final name; only the mark that comes last makes it count."""
    shutil.copytree(store.local(f"{bucket}/run"), store.local(f"{bucket}/cut"))
    (store.local(f"{bucket}/cut") / "checkpoints/8/commit_success.txt").unlink()
    train(bucket, "cut")
    assert measured(bucket, "cut") == measured(disk)
    assert_same(weights(f"{bucket}/cut"), weights(f"{disk}/run"))
    assert store.refused == []


def test_a_run_starts_from_weights_in_the_store(bucket, capsys):
    train(bucket, "fine", steps=1, init_from=f"{bucket}/run")
    assert f"from {bucket}/run: took {len(weights(f'{bucket}/run'))} tensors" in capsys.readouterr().out


def test_a_profile_goes_to_the_store(store, capsys):
    trace = fit.Trace(as_path("gs://bucket/profiled"), start=3)
    for step in range(1, 14):
        trace.at(step, jax.numpy.ones(()) * step)
    assert capsys.readouterr().out == "profile in gs://bucket/profiled/profile\n"
    assert any(name.startswith("gs://bucket/profiled/profile/") and name.endswith(".xplane.pb") for name in store.written)
    assert store.refused == []


def test_without_the_package_for_gs_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(storage, "DRIVERS", {"gs://": ("a_package_that_nobody_has", "gcs")})
    with pytest.raises(UserError, match=r"gs://bucket/run: a_package_that_nobody_has is not installed: `uv sync --extra gcs`"):
        jaxgen.load("gs://bucket/run")
