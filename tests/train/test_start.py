"""How a run begins and why it ends: weights of another run, patience, a loss that is not finite, a trace."""

import contextlib
import io
import json
import re
import shutil
import signal
import sys

import cv2
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import jaxgen
import train
from jaxgen.nn.module import flatten, init_params
from jaxgen.parallel import runtime
from jaxgen.text import bert
from jaxgen.text.sources import resolve
from jaxgen.text.weights import stored
from jaxgen.train.config import EvalConfig, RunConfig
from jaxgen.train.evaluation import keep_best
from jaxgen.train.loop import brief

CONFIG = """
from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.parallel.mesh import MeshConfig
from jaxgen.text.config import TextConfig
from jaxgen.train.config import *

def get_config():
    network = UNet(widths=(8,), down=(1,), up=(1,), attention=("text",), head_dim=8, refiner=0)
    return RunConfig(
        family=Flow(network=network),
        data=DataConfig(name={pictures!r}, image_size=16, dir={data!r}),
        text=TextConfig(source={encoder!r}),
        mesh=MeshConfig(1, 1, 1),
        train=TrainConfig(steps=12, batch_size=4, log_every=1, checkpoint_every=4),
        optimizer=OptimizerConfig(warmup_steps=1),
    )
"""
STILL = "--config.optimizer.learning_rate=1e-30"  # steps that change no weight


def small_encoder(directory):
    """A whole Hugging Face directory with a BERT of one narrow layer."""
    config = {"model_type": "bert", "vocab_size": 30522, "hidden_size": 8, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32}
    shape = bert.BertConfig.from_hf(config, "")
    flat = {name: np.asarray(leaf) for name, leaf in flatten(init_params(shape.build, jax.random.key(0)))}
    directory.mkdir()
    save_file(stored(flat, shape.tensors()), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(resolve("sentence-transformers/all-MiniLM-L6-v2") / "tokenizer.json", directory)


@contextlib.contextmanager
def site(place):
    """A directory with a configuration and a folder of 40 pictures; runs there use this process's devices."""
    (place / "pictures").mkdir()
    for k in range(40):
        cv2.imwrite(str(place / "pictures" / f"{k}.png"), np.full((16, 16, 3), 6 * k, np.uint8))
        (place / "pictures" / f"{k}.txt").write_text(f"grey number {k % 5}")
    small_encoder(place / "encoder")
    names = {"pictures": f"folder:{place / 'pictures'}", "data": str(place / "data"), "encoder": str(place / "encoder")}
    (place / "tiny.py").write_text(CONFIG.format(**names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "start", lambda allow_cpu: None)
        jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes long here
        yield place
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with site(tmp_path_factory.mktemp("starts")) as place:
        yield place


def call(main, *arguments):
    """A script's main() in this process: (exit status, what it said, its errors)."""
    out, err = io.StringIO(), io.StringIO()
    argv, handlers = sys.argv, {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    unraisable = sys.unraisablehook
    sys.argv = ["script", *arguments]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.argv, sys.unraisablehook = argv, unraisable
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()


def begin(place, name, *more):
    return call(train.main, f"--config={place / 'tiny.py'}", f"--workdir={place / name}", *more)


def refused(place, name, *more):
    """The one line of a run that ends with an error."""
    status, _, err = begin(place, name, *more)
    assert status == 2
    (line,) = re.findall("^error: .*$", err, re.MULTILINE)
    assert err.endswith(f"{line}\n")
    assert "Traceback" not in err
    return line


def weights(workdir):
    """The EMA weights of the newest checkpoint."""
    return {name: np.asarray(leaf) for name, leaf in flatten(jaxgen.load(str(workdir)).params)}


def saved(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def listed(out, what):
    (names,) = re.findall(f"^  {what}: (.*)$", out, re.MULTILINE)
    return set() if names == "none" else set(names.split(", "))


@pytest.fixture(scope="module")
def origin(place):
    """A finished run of 12 steps, traced."""
    status, out, err = begin(place, "origin", "--profile", "--config.family.network.up=2")
    assert status == 0, err
    assert f"profile in {place / 'origin' / 'profile'}" in out
    return place / "origin"


def test_a_profile_is_left_where_it_was_said(origin):
    (trace,) = (origin / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_run_begins_with_the_ema_weights_of_another(place, origin):
    # On the way down one block more, on the way up one less.
    start = (f"--config.train.init_from={origin}", "--config.train.steps=1", STILL, "--config.family.network.down=2")
    status, out, err = begin(place, "heir", *start)
    assert status == 0, err
    theirs, ours = weights(origin), weights(place / "heir")
    shared = theirs.keys() & ours.keys()
    assert f"from {origin}: took {len(shared)} tensors\n" in out
    assert listed(out, "new here") == ours.keys() - theirs.keys() != set()
    assert listed(out, "left there") == theirs.keys() - ours.keys() != set()
    assert " from step 0 to 1" in out
    for name in shared:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    # And not the weights that the average was taken of.
    last = dict(flatten(ocp.StandardCheckpointer().restore(origin / "checkpoints" / "12" / "params")))
    assert any((np.asarray(last[name]) != ours[name]).any() for name in shared)
    status, out, _ = begin(place, "heir", *start)
    assert status == 0
    assert "is finished (step 1)" in out
    assert "took" not in out


def test_of_several_origins_each_weight_is_the_firsts_that_has_it(place, origin):
    """What was trained beside what draws, a discriminator, comes along; of a run, not of an exported model."""
    judge = ("--config.family.judge.network=dcgan", "--config.family.judge.network.width=4", "--config.train.ema_decay=0.5")
    network = [f"--config.family.network.{field}" for field in ("widths=8", "down=1", "up=1", "attention=text", "refiner=0")]
    start = ("--config.family=adversarial", *network, "--config.family.network.head_dim=8", *judge)
    status, _, err = begin(place, "judged", *start, "--config.train.steps=2")
    assert status == 0, err
    both = f"--config.train.init_from={origin},{place / 'judged'}"
    status, out, err = begin(place, "pair", *start, both, "--config.train.steps=1", STILL)
    assert status == 0, err
    read = lambda name, step: dict(flatten(ocp.StandardCheckpointer().restore(place / name / "checkpoints" / step / "params")))  # noqa: E731
    ours, judged, theirs = read("pair", "1"), read("judged", "2"), weights(origin)
    shared = theirs.keys() & ours.keys()
    assert f"from {origin}: took {len(shared)} tensors\n" in out
    assert f"from {place / 'judged'}: took {len(ours) - len(shared)} tensors\n" in out
    assert listed(out, "new here") == set()
    beside = {name for name in ours if name.startswith("discriminator.")}
    assert 0 < len(beside) < len(ours) - len(shared)  # the rest is what a flow map has and a flow has not
    average = weights(place / "judged")
    for name, leaf in ours.items():
        expected = theirs if name in shared else judged if name in beside else average
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=1e-25, err_msg=name)
    assert any((judged[name] != average[name]).any() for name in average)
    jaxgen.export(str(place / "judged"), str(place / "alone"), dtype="float32")
    status, out, err = begin(
        place, "bereft", *start, f"--config.train.init_from={place / 'alone'}", "--config.train.steps=1", STILL
    )
    assert status == 0, err
    assert listed(out, "new here") == beside
    nothing = f"--config.train.init_from={place / 'judged'},{origin}"
    assert "/origin has no weight of this network that is still wanted" in refused(place, "nothing", *start, nothing)


def test_many_weights_are_told_by_their_parts():
    names = [f"a.b.{k}.kernel" for k in range(30)]
    assert brief([]) == "none"
    assert brief(names) == ", ".join(names)
    assert brief([*names, "a.head.bias"]) == "a.b (30), a.head (1)"


def test_weights_that_do_not_fit_are_taken_only_around_what_is_skipped(place, origin):
    start = (f"--config.train.init_from={origin}", "--config.train.steps=1", STILL, "--config.family.network.patch=4")
    line = refused(place, "patches", *start)
    assert f"train.init_from={origin}: generator.head." in line
    assert "(12,) there, (48,) here" in line
    assert "name what is to start fresh in train.init_skip" in line
    assert not (place / "patches" / "config.json").exists()
    status, out, err = begin(place, "patches", *start, "--config.train.init_skip=generator.head,generator.stem")
    assert status == 0, err
    theirs, ours = weights(origin), weights(place / "patches")
    fresh = {name for name in ours if name.startswith(("generator.head", "generator.stem"))}
    assert listed(out, "new here") == fresh
    assert listed(out, "left there") == fresh | (theirs.keys() - ours.keys())
    for name in ours.keys() - fresh:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("origin_name", "more", "message"),
    [
        ("origin", ["--config.train.init_skip=generator"], "/origin has no weight of this network"),
        ("nowhere", [], "/nowhere: no such directory or shipped model"),
        ("data", [], "/data has no config.json: it is neither a workdir nor an exported model"),
    ],
)
def test_origins_that_give_nothing_are_refused(place, origin, origin_name, more, message):
    line = refused(place, "orphan", f"--config.train.init_from={place / origin_name}", *more)
    assert message in line
    assert not (place / "orphan" / "config.json").exists()


def test_patience_ends_a_run_that_no_longer_improves(place):
    more = ("--config.train.steps=40", "--config.eval.every=2", "--config.eval.count=4", "--config.eval.patience=2", STILL)
    status, out, err = begin(place, "patient", *more)
    assert status == 0, err
    assert re.search(r"^finished at step 6 after .*: eval/loss has not improved for 2 evaluations;", out, re.MULTILINE)
    scores = {entry["step"]: entry["eval/loss"] for entry in metrics(place / "patient") if "eval/loss" in entry}
    assert list(scores) == [2, 4, 6]
    assert len(set(scores.values())) == 1
    assert saved(place / "patient")[-1] == 6
    status, out, err = begin(place, "patient", *more)
    assert (status, err) == (0, "")
    assert "is finished (step 6)" in out


def test_a_new_best_starts_patience_anew():
    for metric, sign in (("eval/loss", 1.0), ("eval/exact", -1.0)):
        config = RunConfig(eval=EvalConfig(metric=metric, patience=2))
        control = {"best": None, "waited": 0, "stopped": False}
        stopped = []
        for value in (3.0, 2.0, 2.5, 1.0, 1.0, 1.5):
            keep_best(control, config, {metric: sign * value})
            stopped.append(control["stopped"])
        assert stopped == [False] * 5 + [True]
        assert control["best"] == -1.0


def test_a_loss_that_is_not_finite_stops_the_run(place):
    more = ("--config.optimizer.learning_rate=1e30", "--config.train.checkpoint_every=1")
    line = refused(place, "wild", *more)
    assert "the loss or gradient of step 2 is not finite; nothing of it was saved" in line
    assert "optimizer.learning_rate" in line
    assert saved(place / "wild") == [1]
    assert [entry["step"] for entry in metrics(place / "wild") if "loss" in entry] == [1]


def test_a_metric_that_does_not_exist_is_told(place):
    line = refused(place, "unknown", "--config.eval.every=1", "--config.eval.count=4", "--config.eval.metric=eval/fid")
    assert line == "error: eval.metric=eval/fid: this data set has eval/loss"
    assert not (place / "unknown").exists()
    assert not (place / "unknown" / "metrics.jsonl").exists()  # before the first step
