"""Several processes of one run on this machine, as the hosts of a pod would be.

    python -m jaxgen.parallel.launch --processes=2 [--devices=4] [--restarts=10] -- python train.py --config=...

Each process joins the others through a free port of its own choice (JAX_COORDINATOR_ADDRESS and its two companions, which
`jaxgen.parallel.runtime` reads). Process 0 tells what it tells; what others write to stderr is told with their number
before it. Where one fails the rest are ended, and with --restarts all are started again: train.py goes on from its last
checkpoint. SIGTERM and SIGINT are handed to every process. The exit status is that of the process that failed first."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from jaxgen.errors import UserError, cli

# Seconds that the others have to end by themselves when one has failed. They miss a peer after 30; one that is still waiting
# for it to start would do so for minutes.
GRACE = 45.0


def launch(
    command: Sequence[str],
    processes: int,
    *,
    environment: Mapping[str, str] | None = None,
    grace: float = GRACE,
    started: list[subprocess.Popen[str]] | None = None,
    stdout: IO[str] | None = None,
) -> int:
    """Run `command` as `processes` processes of one JAX program to the end: 0, or the first failure's exit status.

    `started` is filled with the processes as they start, for whoever wants to signal them. `stdout` takes what process 0
    prints (by default this program's own)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    started = started if started is not None else []
    relays = []
    for i in range(processes):
        names = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(i)}
        child = subprocess.Popen(
            command,
            env=dict(os.environ if environment is None else environment) | names,
            stdout=stdout if i == 0 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        relays.append(threading.Thread(target=_relay, args=(child.stderr, f"[{i}] " if i else ""), daemon=True))
        relays[-1].start()
    try:
        status = _wait(started[-processes:], grace)
    finally:
        for child in started[-processes:]:
            child.kill()
            child.wait()
    for relay in relays:
        relay.join(1.0)
    return status


def _wait(children: Sequence[subprocess.Popen[str]], grace: float) -> int:
    """Until all have ended, or one has failed and the rest have ended or had their time."""
    while True:
        statuses = [child.poll() for child in children]
        failed = next(((i, status) for i, status in enumerate(statuses) if status), None)
        if failed is not None or None not in statuses:
            break
        time.sleep(0.05)
    if failed is None:
        return 0
    until = time.monotonic() + grace
    while time.monotonic() < until and any(child.poll() is None for child in children):
        time.sleep(0.05)
    left = [str(i) for i, child in enumerate(children) if child.poll() is None]
    if left:
        said = f"process {failed[0]} ended with status {failed[1]}; stopped {grace:g} s later: {', '.join(left)}"
        print(f"error: {said}", file=sys.stderr, flush=True)
    return failed[1]


def _relay(stream: IO[str], prefix: str) -> None:
    for line in stream:
        sys.stderr.write(prefix + line)
        sys.stderr.flush()


@cli
def main() -> None:
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, help="virtual CPU devices of each process (default: shared cores)")
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again after a failure")
    args = parser.parse_args(arguments[:cut])
    command = arguments[cut + 1 :]
    if not command:
        raise UserError("say what to run after --, as in: -- python train.py --config=configs/quickstart.py")
    if args.processes < 1 or args.restarts < 0:
        raise UserError("--processes must be at least 1, --restarts at least 0")
    environment = dict(os.environ)
    if args.devices:
        environment["JAXGEN_CPU_DEVICES"] = str(args.devices)
    running: list[subprocess.Popen[str]] = []
    stopping: list[int] = []

    def forward(number: int, _: object) -> None:
        stopping.append(number)
        for child in running:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for left in range(args.restarts, -1, -1):
        running.clear()
        status = launch(command, args.processes, environment=environment, started=running)
        # 2 is a mistake of the user's, which comes again; but a process whose peer has died ends with 3.
        if status in (0, 2) or stopping or not left:
            break
        print(
            f"a process ended with status {status}: starting all again ({left - 1} restarts left)", file=sys.stderr, flush=True
        )
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
