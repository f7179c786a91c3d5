"""README.md and docs/ as a new user follows them: every command and every Python block runs, in a fresh copy.

A command runs as written but for what RULES add to bound its cost; one that no rule knows fails."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jaxgen.config import apply_overrides, load
from jaxgen.evaluate.pictures import save_png
from jaxgen.storage import as_path, write_text
from jaxgen.train.config import RunConfig
from tests.quick import XLA_FLAGS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NOT_OURS = ("[.]venv", "[.]git", "[.]*_cache", "__pycache__", "runs", "dist", "build", "[.]hypothesis", "[.]cache")


def flag(words: list[str], name: str, default: str) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith(f"--{name}=")), default)


def trained(words: list[str]) -> str:
    return flag(words, "workdir", "runs/" + Path(flag(words, "config", "quickstart.py")).stem) + "/checkpoints/2"


def drawn(words: list[str]) -> str:
    return flag(words, "trace", "") or flag(words, "out", "") or flag(words, "out_dir", "") or "grid.png"


class Rule(NamedTuple):
    """What to do with a command that matches `pattern`."""

    pattern: str
    more: str = ""  # arguments added
    instead: str = ""  # what runs in its place
    leaves: Callable[[list[str]], str] | None = None  # words of the command -> a path that must be there afterwards
    fails: str = ""  # what the one line says that it must end with


SHORT = "--config.train.steps=2 --config.train.batch_size=4 --config.sample.prompts= --config.eval.every=0"
FEW = "--config.data.train_examples=16 --config.data.paraphrases=0"
TINY = " ".join(f"--config.family.network.{field}" for field in ("widths=64", "down=1", "up=1", "attention=text", "refiner=1"))
TINY_CODEC = "--config.family.network.widths=8,8,8 --config.family.network.encoder_blocks=0"
TINY_TOKENS = " ".join(f"--config.family.network.{field}" for field in ("width=32", "depth=1", "refiner=0"))
DRY = "WORKDIR=gs://BUCKET/runs/first scripts/tpu_vm.sh --dry_run {}"
RULES = [  # the first that matches counts
    Rule(r"pip install uv$", instead="uv --version"),
    Rule(r"uv sync( --extra \w+)*$", instead="uv --version"),  # its extras are looked at below
    Rule(r"uv run pytest$", more="--collect-only"),
    Rule(r"uv run (train|sample)\.py .*gs://BUCKET", fails="gs://BUCKET"),
    Rule(r"uv run train\.py .*--dry_run$", leaves=lambda words: "dry_run.png"),
    Rule(r"uv run train\.py --config=configs/caption_lm\.py$", more=f"{SHORT} {FEW}", leaves=lambda _: "runs/caption_lm/model"),
    Rule(r"uv run train\.py --config=configs/scenes_tokenizer\.py$", more=f"{SHORT} {FEW} {TINY_CODEC}", leaves=trained),
    Rule(r"uv run train\.py --config=configs/scenes_ar\.py$", more=f"{SHORT} {FEW} {TINY_TOKENS}", leaves=trained),
    Rule(r"uv run train\.py\b", more=f"{SHORT} {FEW} {TINY}", leaves=trained),
    Rule(r"uv run sample\.py\b", more="--num_images=1 --steps=2", leaves=drawn),
    Rule(r"uv run python -m jaxgen\.parallel\.launch\b", more=f"{SHORT} {FEW} {TINY}", leaves=trained),
    Rule(r"uv run python -m jaxgen\.parallel\.plan .*--topology=", instead="uv run python -m jaxgen.parallel.plan --help"),
    Rule(r"uv run python -m jaxgen\.parallel\.plan\b", more=f"{TINY} --config.train.batch_size=4 --tokens=16"),
    Rule(r"export TPU_TYPE=", instead="true"),
    # Of what needs Google Cloud: that the script knows it. tests/test_scripts.py looks at what it would do.
    *(
        Rule(rf"(WORKDIR=\S+ )?scripts/tpu_vm\.sh (--dry_run )?{what}\b", instead=DRY.format(what))
        for what in ("create", "setup", "run", "log", "fetch", "delete")
    ),
    Rule(r"uv run python session\.py$"),  # the page's Python blocks, written to this file
]

# Stands in for `uv` where it is not on the PATH: the package, or the same with this interpreter.
WITH_UV_PACKAGE = f"""#!/bin/sh
exec {sys.executable} -m uv "$@"
"""
WITHOUT_UV = f"""#!/bin/sh
[ "$1" = run ] && shift
case "$1" in
  python) shift; exec {sys.executable} "$@" ;;
  *.py | --version) exec {sys.executable} "$@" ;;
  *) exec {sys.executable} -m "$@" ;;
esac
"""


def rule_of(command: str) -> Rule:
    found = next((rule for rule in RULES if re.match(rule.pattern, command)), None)
    assert found is not None, f"no rule says how to try this command: {command}"
    return found


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block and of every one indented by four spaces, "" without a language."""
    found, rest = [], text
    for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        found.append((fence.start(), fence[1], fence[2]))
        rest = rest.replace(fence[0], re.sub(r"[^\n]", "x", fence[0]))  # of the same length
    for block in re.finditer(r"(?<=\n\n)(?: {4}.*\n)(?: {4}.*\n|\n(?= {4}))*", rest):
        found.append((block.start(), "", re.sub(r"^ {4}", "", block[0], flags=re.M)))
    return [(language, content) for _, language, content in sorted(found)]


def commands(text: str) -> list[str]:
    """Every command of every block of commands, without comments; in a block with prompts, only what follows one."""
    found = []
    for language, content in blocks(text):
        if language not in ("", "bash", "sh", "shell", "console"):
            continue
        lines = content.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found += [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]
    return found


def session(text: str) -> str:
    """The Python blocks of a page as one program that checks the shapes their comments state: `uint8 [2, 32, 32, 3]` of
    what is assigned, `text.hidden [1, 8, 384]` of what is named."""
    program = []
    for language, content in blocks(text):
        if language != "python":
            continue
        for line in content.splitlines():
            program.append(line)
            code, _, comment = line.partition("  # ")
            for name, shape in re.findall(r"([\w.]+) \[([\d, ]+)\]", comment):
                of = code.partition(" = ")[0] if name == "uint8" else name
                program.append(f"assert {of}.shape == ({shape},), {of}.shape")
                program += [f"assert {of}.dtype == '{name}', {of}.dtype"] if name == "uint8" else []
    return "\n".join(program)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """(a copy of the repository, the environment of a user who has uv and nothing else of ours)."""
    place = tmp_path_factory.mktemp("readme")
    copy = place / "jaxgen"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_OURS))
    for number in range(24):  # DIR: somebody's own pictures, one of them kept for validation
        save_png(as_path(copy / "DIR" / f"{number}.png"), np.full((64, 64, 3), 10 * number, np.uint8), {})
        write_text(as_path(copy / "DIR" / f"{number}.txt"), f"shade {number}")
    ours = ("NPROC", "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"HOME": str(place / "home"), "JAXGEN_CPU_DEVICES": "2"}
    environment |= {"XLA_FLAGS": XLA_FLAGS}
    # What `uv run` would set up is there already: the environment of these tests.
    environment |= {"UV_NO_SYNC": "1", "UV_OFFLINE": "1", "UV_PROJECT_ENVIRONMENT": sys.prefix, "VIRTUAL_ENV": sys.prefix}
    if shutil.which("uv") is None:
        write_text(as_path(place / "bin" / "uv"), WITH_UV_PACKAGE if importlib.util.find_spec("uv") else WITHOUT_UV)
        (place / "bin" / "uv").chmod(0o755)
        environment["PATH"] = f"{place / 'bin'}:{environment['PATH']}"
    return copy, environment


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_works(copy, page):
    directory, environment = copy
    text = (ROOT / page).read_text()
    todo = commands(text)
    if program := session(text):
        (directory / "session.py").write_text(program)
        todo.append("uv run python session.py")
    assert todo
    for command in todo:
        rule = rule_of(command)
        shell = ["bash", "-c", rule.instead or f"{command} {rule.more}"]
        done = subprocess.run(shell, cwd=directory, env=environment, capture_output=True, text=True)
        if rule.fails:
            assert done.returncode == 2, command
            assert re.fullmatch(f"error: .*{rule.fails}.*\n", done.stderr), command
            continue
        assert done.returncode == 0, f"{command} {rule.more}\n{done.stdout}\n{done.stderr}"
        if rule.leaves is not None:
            assert (directory / rule.leaves(shlex.split(command))).exists(), command


def test_a_command_without_a_rule_is_noticed():
    text = "Do this:\n\n    $ uv run train.py  # learns\n    some output\n\nand\n\n```bash\nuv run \\\n  dance.py\n```\n"
    assert commands(text) == ["uv run train.py", "uv run    dance.py"]
    with pytest.raises(AssertionError, match=r"no rule .*: uv run    dance\.py"):
        [rule_of(command) for command in commands(text)]


@pytest.mark.parametrize("page", PAGES)
def test_every_picture_and_link_is_there(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if not re.match(r"https?:|mailto:|#", target):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_extras_and_fields_that_are_named_exist(page):
    text = (ROOT / page).read_text()
    extras = re.findall(r"--extra (\w+)|extra `(\w+)`|\[([\w,]+)\]\"", text)
    assert {name for found in extras for name in "".join(found).split(",")} <= EXTRAS.keys()
    for part in re.split(r"\n\n|\n(?=\||    uv run)", text):  # paragraphs, a table's rows, commands
        fields = [field for field in re.findall(r"--config\.([\w.]+=[^\s`\"]+)", part) if "FIELD" not in field]
        file = re.search(r"--config=(configs/\w+\.py)", part)
        if file and "caption_lm" not in file[1]:
            config = load(str(ROOT / file[1]), fields)
            assert config.sample.sampler in ("", *config.family.samplers), part
        else:
            apply_overrides(RunConfig(), fields)
