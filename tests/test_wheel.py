"""The wheel: what is in it, and that it works unpacked where there is no repository."""

import configparser
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import jax
import pytest
from hatchling import build
from packaging.requirements import Requirement
from PIL import Image

import jaxgen.model
from jaxgen import config as configs
from jaxgen.data.config import DataConfig
from jaxgen.families.base import Shapes
from jaxgen.families.flow import Flow
from jaxgen.families.unet import UNet
from jaxgen.text import load_text_encoder
from jaxgen.train.config import RunConfig
from tests.quick import XLA_FLAGS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"tensorflow", "torch", "transformers", "orbax-checkpoint", "optax", "tensorflow-datasets", "grain"}
NOT_OURS = ("[.]venv", "[.]git", "[.]*_cache", "__pycache__", "runs", "dist", "build", "[.]hypothesis", "[.]cache")
# As an installed console script starts, and with the repository out of reach.
SCRIPT = """
import sys
sys.path = [place for place in sys.path if place != {root!r}]
import jaxgen, jaxgen.config
from {module} import {function}
for module in (jaxgen, jaxgen.config, sys.modules["{module}"]):
    assert module.__file__.startswith({site!r}), module.__file__
sys.exit({function}())
"""


def tiny_model(directory):
    """An untrained model of a few thousand weights, as jaxgen.export writes one."""
    family = Flow(network=UNet(widths=(8,), down=(1,), up=(1,), attention=("none",)))
    config, encoder = RunConfig(family=family, data=DataConfig(image_size=16)), load_text_encoder(RunConfig().text.source)
    params = family.init(jax.random.key(0), Shapes((16, 16, 3), encoder.hidden_size, encoder.pooled_size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxgen.model, "load", lambda workdir: jaxgen.model.Model(config, params, encoder, step=7))
        jaxgen.export("a run", str(directory))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the repository into which a model named tiny was put."""
    place = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, place / "repository", ignore=shutil.ignore_patterns(*NOT_OURS))
    tiny_model(place / "repository" / "jaxgen" / "models" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "repository")
        return place / build.build_wheel(str(place))


@pytest.fixture(scope="module")
def site(wheel):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


@pytest.fixture(scope="module")
def script(site):
    """Runs a console script of the unpacked wheel in an empty directory elsewhere."""
    place = site.parent / "elsewhere"
    place.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    environment |= {"PYTHONPATH": str(site), "HOME": str(place / "home"), "JAXGEN_CPU_DEVICES": "2"}
    environment |= {"XLA_FLAGS": XLA_FLAGS}
    scripts = configparser.ConfigParser()
    scripts.read(next(site.glob("*.dist-info")) / "entry_points.txt")

    def run(name, *arguments):
        module, function = scripts["console_scripts"][name].split(":")
        code = SCRIPT.format(root=str(ROOT), site=str(site), module=module, function=function)
        return subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    run.place = place
    return run


def test_the_wheel_holds_the_package_and_nothing_else(wheel, site):
    version = PROJECT["version"]
    assert sorted(path.name for path in site.iterdir()) == [
        "jaxgen",
        f"jaxgen-{version}.dist-info",
        "jaxgen_configs",
        "jaxgen_sample.py",
        "jaxgen_train.py",
    ]
    for name in ("jaxgen", "configs"):
        inside = site / {"configs": "jaxgen_configs"}.get(name, name)
        files = [p.relative_to(ROOT / name) for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert len(files) >= 5
        for file in files:
            assert (inside / file).read_bytes() == (ROOT / name / file).read_bytes(), file
    info = site / f"jaxgen-{version}.dist-info"
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert wheel.name == f"jaxgen-{version}-py3-none-any.whl"


def test_every_shipped_model_is_whole_and_small(site):
    models = sorted((site / "jaxgen" / "models").iterdir())
    assert "tiny" in [model.name for model in models]
    for model in models:
        assert sorted(file.name for file in model.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        assert (model / "model.safetensors").stat().st_size <= 8 * 2**20, model.name
        assert json.loads((model / "config.json").read_text())["exported"]["step"] > 0


def test_drawing_asks_for_light_packages_only(site):
    metadata = Parser().parsestr((next(site.glob("*.dist-info")) / "METADATA").read_text())
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    bare = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert sorted(map(str, bare)) == sorted(str(Requirement(line)) for line in PROJECT["dependencies"])
    assert not {requirement.name for requirement in bare} & HEAVY
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["License-Expression"] == "Apache-2.0"


def test_both_scripts_explain_themselves_anywhere(script):
    for name, flag in (("jaxgen-train", "--workdir"), ("jaxgen-sample", "--prompt")):
        told = script(name, "--help")
        assert told.returncode == 0, told.stderr
        assert flag in told.stdout


def test_a_shipped_model_draws_anywhere(script):
    done = script(
        "jaxgen-sample", "--model=tiny", "--prompt=a small red circle", "--num_images=2", "--steps=2", "--out_dir=out"
    )
    assert done.returncode == 0, done.stderr
    sizes = {path.name: Image.open(path).size for path in (script.place / "out").iterdir()}
    assert sizes == {"0000.png": (16, 16), "0001.png": (16, 16)}
    refused = script("jaxgen-sample", "--model=nothing", "--prompt=a")
    assert refused.returncode == 2
    assert "nothing: no such directory or shipped model; shipped are" in refused.stderr
    assert "tiny" in refused.stderr


def test_training_finds_the_shipped_configurations_anywhere(script):
    tiny = [
        "--config.train.steps=1",
        "--config.train.batch_size=2",
        "--config.data.train_examples=8",
        "--config.sample.prompts=",
    ]
    tiny += [f"--config.family.network.{field}" for field in ("widths=64", "down=1", "up=1", "attention=text", "refiner=1")]
    done = script("jaxgen-train", *tiny)
    assert done.returncode == 0, done.stderr
    found = json.loads((script.place / "runs" / "quickstart" / "config.json").read_text())
    overrides = [word.removeprefix("--config.") for word in tiny]
    assert found == configs.to_dict(configs.load(str(ROOT / "configs" / "quickstart.py"), overrides))
    assert (script.place / "runs" / "quickstart" / "checkpoints" / "1").is_dir()
    refused = script("jaxgen-train", "--config=configs/nothing.py")
    assert refused.returncode == 2
    for config in (ROOT / "configs").glob("*.py"):
        assert config.name in refused.stderr
