"""Several processes as one run: the same numbers as of one, and the end of one of them."""

import json
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from cv2 import imencode

from jaxgen.data.scenes import example, render
from jaxgen.parallel.launch import launch
from jaxgen.text.scratch import scene_captions, write
from tests.data.test_shards import tar_of
from tests.train.runs import command, environment, weights

CONFIG = """
from jaxgen.data.config import DataConfig
from jaxgen.families.flow import Flow
from jaxgen.families.transformer import Transformer
from jaxgen.text.config import TextConfig
from jaxgen.train.config import *

def get_config():
    return RunConfig(
        family=Flow(network=Transformer(width=16, depth=1, head_dim=8)),
        data=DataConfig(image_size=16, train_examples=64, dir={data!r}),
        text=TextConfig(source={text!r}),
        train=TrainConfig(steps=6, batch_size=8, log_every=1, checkpoint_every=3),
        eval=EvalConfig(every=6, count=16),
    )
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    write(place / "text", scene_captions(("en",)))  # a text encoder that takes no time
    for shard in range(4):
        files = {}
        for k in range(shard * 20, shard * 20 + 20):
            scene, captions = example("train", k, size=16)[:2]
            files[f"{k}.png"] = imencode(".png", render(scene, 16)[..., ::-1])[1].tobytes()
            files[f"{k}.json"] = json.dumps({"caption": captions[0]}).encode()
        (place / f"{shard:05d}.tar").write_bytes(tar_of(files))
    (place / "tiny.py").write_text(CONFIG.format(data=str(place / "data"), text=str(place / "text")))
    return place


class Pair:
    """Two processes of a run, under way."""

    def __init__(self, place, name, *more, devices=1):
        self.workdir, self.log = place / name, place / f"{name}.log"
        self.processes, self.status = [], None
        self._log = open(self.log, "a")  # noqa: SIM115
        what = {"environment": environment(place, devices), "started": self.processes, "stdout": self._log, "grace": 120}
        self._thread = threading.Thread(target=self._run, args=(command(place, name, *more), what), daemon=True)
        self._thread.start()

    def _run(self, arguments, what):
        self.status = launch(arguments, 2, **what)

    def until_step(self, step):
        while not (self.steps() and self.steps()[-1] >= step):
            assert self._thread.is_alive(), self.log.read_text()
            time.sleep(0.1)
        return self

    def steps(self):
        found = [line.split("/")[0].split() for line in self.log.read_text().splitlines() if line.startswith("step ")]
        return [int(words[1]) for words in found if len(words) == 2]

    def end(self):
        """The statuses of both; they are waited for."""
        self._thread.join(600)
        assert not self._thread.is_alive()
        self._log.close()
        return [process.returncode for process in self.processes]


def lines(workdir):
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): line[name] for line in found for name in ("loss", "eval/loss") if name in line}


def test_two_processes_of_four_devices_are_one_of_eight(place, capfd):
    """The pair also looks through the shards, two of them each, and encodes the captions."""
    shards = f"--config.data.name=tar:{place}/{{00000..00003}}.tar"
    overrides = (shards, "--config.mesh.data=2", "--config.mesh.fsdp=4")
    pair = Pair(place, "pair", *overrides, devices=4)
    assert pair.end() == [0, 0]
    assert "2 processes" in pair.log.read_text()
    looked = [line for line in capfd.readouterr().err.splitlines() if "looking through" in line]
    assert sorted(looked) == ["[1] looking through 2 shards of 4", "looking through 2 shards of 4"]
    run = {"env": environment(place, 8), "capture_output": True, "text": True, "timeout": 600}
    alone = subprocess.run(command(place, "alone", *overrides), **run)
    assert alone.returncode == 0, alone.stderr
    assert "looking through" not in alone.stderr
    ours, theirs = lines(place / "pair"), lines(place / "alone")
    assert ours.keys() == theirs.keys()
    assert (6, "eval/loss") in ours
    np.testing.assert_allclose([ours[k] for k in ours], [theirs[k] for k in ours], rtol=2e-6)
    pair, one = weights(place / "pair"), weights(place / "alone")
    assert max(np.abs(pair[name] - one[name]).max() for name in pair) <= 1e-5


def test_the_end_of_one_is_the_end_of_both(place, capfd):
    long = ("--config.train.steps=100000", "--config.train.checkpoint_every=100000", "--config.eval.every=0")
    asked = Pair(place, "ends", *long).until_step(3)
    asked.processes[1].send_signal(signal.SIGTERM)  # one is asked to stop: both save after the same step
    assert asked.end() == [0, 0]
    stopped = asked.steps()[-1]
    assert f"stopped at step {stopped} and saved" in asked.log.read_text()
    assert sorted(path.name for path in (place / "ends" / "checkpoints").iterdir() if path.name.isdigit()) == [str(stopped)]
    capfd.readouterr()

    lost = Pair(place, "ends", *long).until_step(stopped + 2)
    assert f"from step {stopped} to" in lost.log.read_text()
    lost.processes[1].kill()
    began = time.monotonic()
    assert lost.end() == [3, -signal.SIGKILL]
    assert lost.status in (3, -signal.SIGKILL)
    assert time.monotonic() - began < 60
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "another process of this run has ended" in told[0]
