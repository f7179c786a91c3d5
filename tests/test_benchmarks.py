"""The pure parts of the benchmarks; what they measure with is tested beside its own room."""

import importlib
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen.data.scenes import KINDS, caption, example, render
from jaxgen.errors import UserError
from jaxgen.evaluate.verifier import verify
from jaxgen.text.features import TextFeatures

DIRECTORY = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def bench():
    return module("families")


@pytest.fixture(scope="module")
def training():
    return module("training")


def module(name):
    """As `python benchmarks/families.py` imports it."""
    sys.path.insert(0, DIRECTORY)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(DIRECTORY)


@pytest.fixture(scope="module")
def plans(bench):
    names = [*bench.CODECS, *bench.FAMILIES]
    return bench.plan(names, {name: f"somewhere/{name}" for name in names}, 0.5, "sets")


def test_networks_and_arithmetic_are_alike(bench, plans):
    bench.check(plans)
    first = plans["flow"]
    assert first.steps == 5500  # half of configs/scenes.py
    assert first.params == 2_545_612
    for name in bench.FAMILIES:
        assert abs(plans[name].params / first.params - 1) < bench.TOLERANCE, name
        assert abs(plans[name].flops / first.flops - 1) < 1e-3, name
        assert (plans[name].others > 0) == (name in ("gan", "dmd", "adversarial"))
    assert plans["tokenizer"].steps == 1500
    assert "--config.family.codec.source=somewhere/tokenizer" in plans["autoregressive"].command
    assert "--config.train.init_from=somewhere/flow" in plans["onestep"].command
    assert "--config.train.init_from=somewhere/dmd,somewhere/gan" in plans["adversarial"].command
    assert bench.course("adversarial", {}) == ["flow", "dmd", "gan", "adversarial"]
    assert bench.course("adversarial", {"dmd": "there"}) == ["gan", "adversarial"]
    assert bench.course("vae", {}) == ["vae"]
    assert all(f"--workdir=somewhere/{name}" in found.command for name, found in plans.items())
    assert all("--config.data.dir=sets" in found.command for found in plans.values())


def test_a_network_of_another_size_is_refused(bench, plans):
    with pytest.raises(UserError, match=r"gan draws with 3,000,000 parameters, flow with 2,545,612: choose"):
        bench.check({**plans, "gan": plans["gan"]._replace(params=3_000_000)})


def test_what_is_finished_is_not_trained_again(training, tmp_path, monkeypatch, capsys):
    calls = []

    def run(command, **_):
        calls.append(command)
        (tmp_path / "gan" / "checkpoints" / "20").mkdir(parents=True)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(training.subprocess, "run", run)
    training.train("gan", ["--config=gan.py"], 20, tmp_path / "gan")
    training.train("gan", ["--config=gan.py"], 20, tmp_path / "gan")
    assert len(calls) == 1
    assert calls[0][1].endswith("train.py")
    assert calls[0][2:] == ["--config=gan.py"]
    assert "is finished" in capsys.readouterr().out


def test_a_training_that_fails_is_told_in_one_line(training, tmp_path, monkeypatch):
    def run(command, stdout, **_):
        stdout.write("compiled\nerror: no space left\n")
        return type("Done", (), {"returncode": 2})

    monkeypatch.setattr(training.subprocess, "run", run)
    with pytest.raises(UserError, match=r"^vae was not trained to its end \(status 2: error: no space left\)") as error:
        training.train("vae", [], 20, tmp_path / "new" / "vae")
    assert "\n" not in str(error.value)


def test_a_scene_drawn_again_has_the_same_caption_at_other_places(bench):
    rng = np.random.default_rng(0)
    scenes = [example("test", k)[0] for k in range(24)]
    assert {scene.kind for scene in scenes} == set(KINDS)
    again = [bench.redraw(scene, rng) for scene in scenes]
    assert list(map(caption, again)) == list(map(caption, scenes))
    assert all(a.objects[0].x != b.objects[0].x for a, b in zip(again, scenes, strict=True))
    assert verify(np.stack([render(scene) for scene in again]), scenes).exact.all()


def test_diversity_is_a_share_of_the_data_s_own(bench):
    rng = np.random.default_rng(1)
    scenes = [example("test", k)[0] for k in range(40)]
    images = np.stack([[render(bench.redraw(scene, rng)) for _ in range(3)] for scene in scenes])
    right = np.ones((40, 3), bool)
    assert bench.spread(images, right, scenes)["share"] == pytest.approx(1.0, abs=0.1)
    right[20:, 1:] = False  # of these no two are right: they count neither here nor there
    half = bench.spread(np.repeat(images[:, :1], 3, axis=1), right, scenes)
    assert half["drawn"] == 0.0
    assert half["share"] == 0.0
    assert bench.spread(images, np.zeros((40, 3), bool), scenes) == {"drawn": None, "data": None, "share": None}


class Slow:
    """Draws grey; one picture a call takes a second, 64 take two."""

    def __init__(self):
        self.now = 0.0

    def sample(self, prompts, seed=0):
        self.now += 1.0 if len(prompts) == 1 else 2.0
        return np.zeros((len(prompts), 32, 32, 3), np.uint8)


def test_rates_and_shares(bench, monkeypatch):
    model = Slow()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: model.now)
    assert bench.rates({"a": model}, ["a red circle"] * 64) == {"a": {"1": 1.0, "64": 32.0}}
    shares, images, exact, captions = bench.judged(model, "test", 5, 2)
    assert images.shape == (5, 2, 32, 32, 3)
    assert exact.shape == (5, 2)
    assert len(captions) == 5
    assert shares["exact"] == {"mean": 0.0, "seeds": [0.0, 0.0]}


def test_what_a_shipped_model_says_of_its_training(bench):
    found = bench.of_training("flow")
    assert (found["steps"], found["batch_size"], found["flops_beside"]) == (11_000, 32, 0)
    assert found["train_images_per_sec"] is None
    assert found["peak_memory_bytes"] is None
    assert 3e14 < found["flops"] < 5e14


def test_the_table(bench):
    training = {"steps": 7, "flops": 2e15, "flops_beside": None, "train_images_per_sec": 95.25, "peak_memory_bytes": 2**29}
    row = {
        "params": 2_500_000,
        "params_beside": 0,
        "training": training,
        "images_per_sec": {"1": 2.0, "64": 9.0},
        "diversity": {"share": 0.8},
        "accuracy": {"test": {"exact": {"mean": 0.929}, "exact_single": {"mean": 1.0}}},
    }
    figures = ["2.500", "0.000", "2.0000", "-", "95.2", "0.50", "2.0", "9.0", "0.800"]
    first, second = bench.table({"flow": row}).split("\n\n")
    assert first.splitlines()[1].split() == ["flow", "7", *figures]
    assert second.splitlines()[1].split() == ["flow", "test", "92.9", "100.0", "-", "-"]
    assert len({*map(len, second.splitlines())}) == 1  # figures end below their heads


def test_which_families(bench):
    assert bench.chosen(None, {}) == list(bench.FAMILIES)
    assert bench.chosen("vae,flow", {}) == ["flow", "vae"]
    assert bench.chosen(None, bench.pairs("gan=runs/b,flow=runs/a")) == ["flow", "gan"]
    with pytest.raises(UserError, match="'gam' is no family here: choose from flow, onestep"):
        bench.chosen("gam", {})
    with pytest.raises(UserError, match="'flow' is no FAMILY=DIRECTORY"):
        bench.pairs("flow")


def test_what_the_peer_is_given_is_what_our_step_draws(tmp_path):
    """Times, noise, weights and texts of a problem, from which PyTorch computes its losses, give ours."""
    ours = module("generators").Ours.__new__(module("generators").Ours)  # without starting JAX anew
    problem = ours.write("tiny", str(tmp_path / "problem.npz"), bfloat16=False)
    held = np.load(tmp_path / "problem.npz")
    run, show = ours.train("ours", drawn=False)
    given = {name: held[name][0] for name in ("image", "hidden", "pooled", "mask", "t", "noise")}
    image, at = given["image"] / np.float32(127.5) - 1, given["t"][:, None, None, None]
    text = TextFeatures(given["hidden"], given["pooled"], given["mask"])
    clean = ours.family._predict(ours.params, jnp.asarray((1 - at) * image + at * given["noise"]), given["t"], text)
    weight = 1 / np.maximum(given["t"], problem["loss_min_time"]) ** 2
    expected = np.mean(np.mean(np.square(clean - image), (1, 2, 3)) * weight)
    assert show(run()) == pytest.approx(expected, rel=1e-5)
    assert not np.any([np.all(held[name] == 0) for name in held.files if name.startswith("weight:")])
    assert problem["parameters"] == sum(held[name].size for name in held.files if name.startswith("weight:"))
    run, show = ours.sample("ours", 2, steps=1, guidance=1.0, shift=1.0)  # one step ends on the clean picture predicted
    noise, text = jnp.asarray(held["noise"][0, :2]), TextFeatures(*(given[name][:2] for name in ("hidden", "pooled", "mask")))
    assert show(run()) == pytest.approx(np.asarray(ours.family._predict(ours.params, noise, jnp.ones(2), text)), abs=1e-5)


def test_scaling_times_a_step_and_reads_the_exponent(capsys):
    """One point in this process: what a round times is train.py's step, and the loss it shows changes with it."""
    scaling = module("scaling")
    assert scaling.exponent([1, 2, 4], [3, 3 * 2**1.5, 3 * 4**1.5]) == pytest.approx(1.5)
    side = scaling.Side()
    point = scaling.Point(width=32, depth=1, size=16, batch=8, data=2, fsdp=2)
    assert (point.tokens, point.devices) == (32, 4)
    run, show = side.step("a", list(point))
    first, second = show(run()), show(run())
    assert np.isfinite([first, second]).all()
    assert first != second
    facts = side.told()["a"]
    assert facts["sent"] > facts["parameters"]  # at least what fsdp gathers
    rows = [point._asdict() | facts | {"devices": 1, "seconds": 1.0}, point._asdict() | facts | {"devices": 4, "seconds": 1.5}]
    assert scaling.tell("devices", rows) == {"fsdp=4": pytest.approx(0.5)}
    assert "50%" in capsys.readouterr().out
