"""scripts/tpu_vm.sh: what it would do, by its dry run."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "tpu_vm.sh")
HERE = {"TPU_NAME": "mine", "TPU_ZONE": "us-east5-b", "TPU_TYPE": "v6e-16", "WORKDIR": "gs://bucket/runs/first"}


def tpu_vm(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "WORKDIR"))}
    return subprocess.run(["sh", SCRIPT, *arguments], env=clean | environment, capture_output=True, text=True)


def dry(*arguments, **environment):
    done = tpu_vm("--dry_run", *arguments, **HERE | environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines() if not line.startswith("#")]


def test_a_slice_is_made_and_deleted():
    (made,) = dry("create")
    assert made[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "mine"]
    assert made[6:] == ["--zone=us-east5-b", "--accelerator-type=v6e-16", "--version=v2-alpha-tpuv6e"]
    assert dry("create", TPU_SPOT="1", TPU_TYPE="v5litepod-16")[0][-2:] == ["--version=v2-alpha-tpuv5-lite", "--spot"]
    assert dry("create", TPU_RUNTIME="other", TPU_TYPE="v9-8")[0][-1] == "--version=other"
    assert dry("delete") == [[*made[:4], "delete", "mine", "--zone=us-east5-b", "--quiet"]]


def test_setup_carries_this_commit_to_every_worker():
    archive, copy, install = dry("setup")
    assert archive[:2] == ["git", "archive"]
    assert copy[4:7] == ["scp", "/tmp/jaxgen.tar.gz", "mine:"]
    assert "--worker=all" in copy
    assert "--worker=all" in install
    assert install[-1].endswith("uv sync --quiet --extra tpu --extra gcs")


def test_training_gets_its_arguments_whole(tmp_path):
    """What the worker's shell makes of the command: a stand-in for Python there notes its arguments."""
    given = ["--config=configs/x.py", "--config.data.name=tar:gs://b/{0..9}.tar", "--config.sample.prompts=it's a cat,two dogs"]
    (said,) = dry("run", *given)
    assert "--worker=all" in said
    (tmp_path / "jaxgen").mkdir()
    (tmp_path / "python3").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    command = said[-1].removeprefix("--command=").replace("</dev/null & }", "</dev/null; }")  # waited for
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True)
    started = (tmp_path / "jaxgen" / "train.log").read_text().splitlines()
    assert started[started.index("train.py") :] == ["train.py", "--workdir=gs://bucket/runs/first", *given]


def test_results_come_from_the_bucket():
    made, *copies = dry("fetch")
    assert made == ["mkdir", "-p", "runs/first"]
    assert [copy[-2:] for copy in copies] == [
        [f"gs://bucket/runs/first/{part}", "runs/first/"] for part in ("config.json", "metrics.jsonl", "samples")
    ]


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["run"], {}, "error: set WORKDIR=gs://"),
        (["run"], {"WORKDIR": "runs/here"}, "error: set WORKDIR=gs://"),
        (["create"], {"TPU_TYPE": "v9-8"}, "error: TPU_TYPE=v9-8: known are"),
    ],
)
def test_mistakes_end_with_one_line(arguments, environment, said):
    done = tpu_vm("--dry_run", *arguments, **environment)
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert done.stdout == ""


def test_the_rest_is_help():
    assert "create | setup | run" in tpu_vm("--help").stdout
    assert tpu_vm("dance").returncode == 2
