import os
import signal
import subprocess
import sys
import time

import pytest

from jaxgen.parallel.launch import launch

# A process of a run: writes who it is, and does what the second argument says of its number.
CHILD = """
import os, pathlib, sys, time
names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
told = [os.environ[name] for name in names]
place = pathlib.Path(sys.argv[1])
with open(place / told[2], "a") as file:
    print(*told, file=file)
print("out", told[2], flush=True)
print("err", told[2], file=sys.stderr, flush=True)
exec(sys.argv[2])
"""


def starts(place):
    """{process: its lines, one a start}."""
    return {file.name: file.read_text().splitlines() for file in place.iterdir() if file.name.isdigit()}


def test_processes_know_each_other_and_the_first_one_speaks(tmp_path, capfd):
    assert launch([sys.executable, "-c", CHILD, str(tmp_path), ""], 3) == 0
    told = starts(tmp_path)
    assert [line.split()[1:] for name in "012" for line in told[name]] == [["3", "0"], ["3", "1"], ["3", "2"]]
    assert len({line.split()[0] for lines in told.values() for line in lines}) == 1  # one coordinator
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["[1] err 1", "[2] err 2", "err 0"]


def test_one_that_fails_ends_the_rest(tmp_path, capfd):
    act = "sys.exit(5) if told[2] == '1' else time.sleep(600)"
    began = time.monotonic()
    assert launch([sys.executable, "-c", CHILD, str(tmp_path), act], 2, grace=0.5) == 5
    assert time.monotonic() - began < 60
    assert "error: process 1 ended with status 5; stopped 0.5 s later: 0" in capfd.readouterr().err.splitlines()


def command(place, act, *options):
    return [sys.executable, "-m", "jaxgen.parallel.launch", *options, "--", sys.executable, "-c", CHILD, str(place), act]


@pytest.mark.parametrize(
    ("act", "status", "count"),
    [
        ("sys.exit(0 if len(open(place / told[2]).readlines()) == 3 else 7)", 0, 3),  # well at the third start
        ("sys.exit(7)", 7, 3),
        ("sys.exit(2)", 2, 1),  # a user's mistake would come again
        ("import signal; os.kill(os.getpid(), signal.SIGKILL)", 137, 3),
    ],
)
def test_restarts(tmp_path, act, status, count):
    done = subprocess.run(command(tmp_path, act, "--processes=1", "--restarts=2"), capture_output=True, text=True)
    assert done.returncode == status
    assert len(starts(tmp_path)["0"]) == count
    assert done.stderr.count("starting all again") == count - 1


def test_sigterm_reaches_all_and_nothing_is_started_again(tmp_path):
    act = "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); (place / 'ready').touch(); time.sleep(600)"
    running = subprocess.Popen(command(tmp_path, act, "--processes=2", "--restarts=5"), stderr=subprocess.DEVNULL)
    try:
        while not ((tmp_path / "ready").exists() and len(starts(tmp_path)) == 2):
            time.sleep(0.05)
        time.sleep(0.5)  # until the second, too, has its handler
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait(60) == 9
    finally:
        running.kill()
    assert {name: len(lines) for name, lines in starts(tmp_path).items()} == {"0": 1, "1": 1}


@pytest.mark.parametrize(("options", "said"), [(["--processes=0"], "--processes"), ([], "say what to run")])
def test_mistakes(options, said):
    end = ["--", "true"] if options else []
    done = subprocess.run([sys.executable, "-m", "jaxgen.parallel.launch", *options, *end], capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
