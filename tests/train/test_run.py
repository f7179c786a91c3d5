"""Whole runs through the two scripts, as a user makes them: killed, damaged, gone on with, drawn from."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cv2 import imread, imwrite

import jaxgen
from jaxgen.errors import UserError
from jaxgen.evaluate.pictures import read_metadata
from jaxgen.storage import PART, as_path
from tests.train.runs import ROOT, command, environment, weights

CONFIG = """
from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.train.config import *

def get_config():
    return RunConfig(
        family=Flow(network=Transformer(width=16, depth=1, head_dim=8, dropout=0.1)),  # soon compiled
        data=DataConfig(image_size=16, train_examples=64, dir={data!r}),
        train=TrainConfig(steps=24, batch_size=8, log_every=1, checkpoint_every=3),
        sample=SampleConfig(prompts=("a small red circle",), every=12, num_steps=3),
        eval=EvalConfig(every=12, count=16),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    (place / "tiny.py").write_text(CONFIG.format(data=str(place / "data")))
    return place


def train(place, name, *more):
    return subprocess.run(command(place, name, *more), env=environment(place), capture_output=True, text=True, timeout=300)


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def assert_same(workdir, other):
    ours, theirs = weights(workdir), weights(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert lines(workdir) == lines(other)


@pytest.fixture(scope="module")
def finished(place):
    done = train(place, "whole")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert "on cpu" in first
    assert "2 devices" in first
    assert "float32" in first
    return place / "whole"


def test_a_run_leaves_what_it_promises(finished):
    assert sorted(lines(finished)) == list(range(1, 25))
    entries = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    training = next(entry for entry in entries if "loss" in entry)
    assert training.keys() >= {"step", "loss", "step_ms", "images_per_sec", "grad_norm"}
    assert [entry["step"] for entry in entries if "eval/exact" in entry] == [12, 24]
    assert (finished / "samples" / "step_0000012.png").exists()
    assert list((finished / "tensorboard").iterdir())
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 24


def test_pictures_of_several_shapes_are_learned_and_drawn(place, tmp_path):
    (tmp_path / "own").mkdir()
    for k in range(48):
        high, wide = ((16, 16), (40, 60), (60, 40))[k % 3]
        imwrite(tmp_path / "own" / f"{k}.png", np.full((high, wide, 3), 4 * k, np.uint8))
        (tmp_path / "own" / f"{k}.txt").write_text(f"grey number {k}")
    own = (f"--config.data.name=folder:{tmp_path / 'own'}", "--config.data.max_aspect_ratio=2")
    done = train(place, "shapes", *own, "--config.sample.aspect_ratio=1.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled in") == 3
    found = lines(place / "shapes")
    assert list(found) == list(range(1, 25))
    assert all(np.isfinite(loss) for loss in found.values())
    assert imread(place / "shapes/samples/step_0000024.png").shape[:2] == (round(128 * 12 / 20) + 13 * 1 + 18, 128 + 12)
    model = jaxgen.load(str(place / "shapes"))
    shapes = {ratio: model.sample("grey", aspect_ratio=ratio, num_steps=1).shape[1:3] for ratio in (1, 16 / 9, 2 / 3)}
    assert shapes == {1: (16, 16), 16 / 9: (12, 20), 2 / 3: (20, 12)}
    with pytest.raises(UserError, match="aspect_ratio=0 is width over height"):
        model.sample("grey", aspect_ratio=0)


def test_a_finished_run_says_so(place, finished):
    again = train(place, "whole")
    assert again.returncode == 0
    assert "is finished" in again.stdout


def test_a_killed_run_goes_on_bit_for_bit(place, finished):
    process = subprocess.Popen(command(place, "killed"), env=environment(place), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = place / "killed" / f".metrics.jsonl.k1l{PART}"
    half.write_text('{"step": 10')
    again = train(place, "killed")
    assert again.returncode == 0
    assert "taken from an earlier start" in again.stdout  # what the first run of this configuration compiled
    assert_same(place / "killed", finished)
    assert not half.exists()


def test_a_run_of_two_groups_is_killed_goes_on_and_draws(place):
    fields = ("family=gan", "family.network=dcgan", "family.network.width=4", "eval.every=0", "sample.prompts=")
    more = [f"--config.{field}" for field in fields]
    process = subprocess.Popen(command(place, "pairs", *more), env=environment(place), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = lines(place / "pairs")
    done = train(place, "pairs", *more)
    assert done.returncode == 0, done.stderr
    after = lines(place / "pairs")
    assert "from step 0 to" not in done.stdout
    assert sorted(after) == list(range(1, 25))
    assert {step: after[step] for step in before} == before != {}  # also of the steps made twice
    drawn = sample(place, f"--workdir={place / 'pairs'}", "--prompt=a small red circle", "--num_images=2", "--out_dir=drawn")
    assert drawn.returncode == 0, drawn.stderr
    pictures = [imread(place / "drawn" / f"{i:04d}.png") for i in range(2)]
    assert [picture.shape for picture in pictures] == [(16, 16, 3)] * 2
    assert (pictures[0] != pictures[1]).any()


def test_a_terminated_run_saves_and_goes_on_elsewhere(place, finished):
    process = subprocess.Popen(
        command(place, "stopped"), env=environment(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert time.monotonic() - began < 30
    assert "saved" in out
    # A moved workdir, another log_every: the same run.
    shutil.move(place / "stopped", place / "moved")
    assert train(place, "moved", "--config.train.log_every=2").returncode == 0
    ours, theirs = weights(place / "moved"), weights(finished)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_a_damaged_newest_checkpoint_is_passed_over(place, finished):
    shutil.copytree(finished, place / "damaged")
    steps = sorted(int(p.name) for p in (place / "damaged" / "checkpoints").iterdir() if p.name.isdigit())
    newest = place / "damaged" / "checkpoints" / str(steps[-1])
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    done = train(place, "damaged")
    assert done.returncode == 0, done.stderr
    assert f"checkpoint {steps[-1]} in" in done.stderr
    assert f"going back to checkpoint {steps[-2]}" in done.stderr
    assert_same(place / "damaged", finished)


def test_another_configuration_is_refused_by_name(place, finished):
    refused = train(place, "whole", "--config.optimizer.learning_rate=0.5")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error:")
    assert "optimizer.learning_rate (0.001 there, 0.5 here)" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.tensor=64", "asks for 64 devices"),
        ("train.batch_size=7", "does not divide"),
        ("data.name=sceens", "unknown; known: scenes"),
        ("data.name=emoji", "data.source"),
        ("text.source=/nowhere", "no such directory"),
        ("data.image_size=18", "no multiple of family.network.patch=4"),
    ],
)
def test_mistakes_end_with_one_line(place, override, message):
    refused = train(place, "refused", f"--config.{override}")
    assert refused.returncode == 2
    assert not list((place / "refused").glob("*"))  # nothing half-written
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr


def sample(place, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), *arguments],
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=place,
    )


def test_sampling_writes_pictures_that_say_how_they_were_made(place, finished):
    prompts = ("a small red circle", "three small blue rings")
    arguments = [f"--prompt={p}" for p in prompts] + ["--num_images=2", "--steps=3", "--guidance=2", "--seed=5"]
    done = sample(place, f"--workdir={finished}", *arguments, "--out=grid.png", "--out_dir=pictures")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (place / "pictures").iterdir()) == [f"{i:04d}.png" for i in range(4)]
    told = read_metadata(as_path(place / "pictures" / "0003.png"))
    assert told["prompt"] == prompts[1]
    assert (told["seed"], told["num_steps"], told["guidance_scale"], told["step"]) == ("5", "3", "2.0", "24")
    assert json.loads(read_metadata(as_path(place / "grid.png"))["prompts"]) == list(prompts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to draw"),
        (["--prompt=  "], "empty prompt"),
        (["--prompt=一个小的红色圆形在一个大的蓝色正方形的左边"], "multilingual"),
        (["--prompt=a", "--num_images=0"], "--num_images=0"),
        (["--prompts_file=none.txt"], "cannot be read"),
        (["--prompt=a", "--workdir=nowhere"], "nowhere"),
    ],
)
def test_sampling_mistakes_end_with_one_line(place, finished, arguments, message):
    if not any(a.startswith("--workdir") for a in arguments):
        arguments = [*arguments, f"--workdir={finished}"]
    done = sample(place, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_picture_depends_on_its_own_prompt_alone(finished):
    model = jaxgen.load(str(finished))
    prompts = ["a small red circle", "a large blue ring above a small green cross", "two large black squares"]
    settings = {"num_images": 2, "seed": 3, "num_steps": 3}
    together = model.sample(prompts, **settings).astype(int)
    assert np.abs(together[:2] - model.sample(prompts[:1], **settings)).max() <= 1
    crowd = model.sample([*prompts, *["a small white cross"] * 40], **settings)
    assert np.abs(together - crowd[:6]).max() <= 1
    assert (together[0] != together[1]).any()
    assert (together != model.sample(prompts, **settings | {"seed": 4})).any()


def test_an_exported_model_draws_the_same(finished, tmp_path):
    jaxgen.export(str(finished), str(tmp_path / "exported"), dtype="float32")
    a, b = jaxgen.load(str(finished)), jaxgen.load(str(tmp_path / "exported"))
    np.testing.assert_array_equal(*(m.sample(["a small red circle"], num_steps=3) for m in (a, b)))
    file = tmp_path / "exported" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(jaxgen.UserError, match="no whole safetensors file"):
        jaxgen.load(str(tmp_path / "exported"))
