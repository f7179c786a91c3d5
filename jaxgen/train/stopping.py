"""When a run is to stop before its end: SIGTERM, SIGINT, a cloud's notice of preemption; after the same step on every host."""

import contextlib
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Generator

import jax
from jax.experimental import multihost_utils

from jaxgen.parallel.runtime import METADATA, on_google_cloud

# https://cloud.google.com/compute/docs/instances/preemptible: answers at once when the value changes, and after 30 s anyway.
NOTICE = f"{METADATA}preempted?wait_for_change=true&timeout_sec=30"


@contextlib.contextmanager
def stopping(notice: str | None = None) -> Generator[Callable[[int], bool]]:
    """Within, SIGTERM and SIGINT ask the run to save and stop; a second SIGINT interrupts at once.

    Yields a function that says after each step, by its number, whether to stop. Of several processes one that is asked is
    enough: JAX's coordination service tells the others, and all stop after one step that none of them has passed. That costs
    the steps nothing. `notice`: address that answers TRUE when this host is about to be taken away (default: Google Cloud's,
    on its machines)."""
    several = jax.process_count() > 1
    caught: list[int] = []

    def handler(number: int, _: object) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)
        print("stopping: saving after this step", file=sys.stderr, flush=True)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    # With several processes SIGTERM belongs to JAX, which has caught it since jax.distributed.initialize.
    numbers = (signal.SIGINT,) if several else (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, handler) for number in numbers}
    ended = threading.Event()
    address = notice or (NOTICE if on_google_cloud() else None)
    if address:
        threading.Thread(target=_watch, args=(address, ended), daemon=True, name="preemption").start()
    try:
        yield multihost_utils.reached_preemption_sync_point if several else lambda _: bool(caught)
    finally:
        ended.set()
        for number, old in before.items():
            signal.signal(number, old)


def _watch(address: str, ended: threading.Event) -> None:
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    while not ended.is_set():
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                taken = answer.read().strip().upper() == b"TRUE"
        except OSError:
            ended.wait(5)
            continue
        if taken and not ended.is_set():
            print("this machine is about to be taken away", file=sys.stderr, flush=True)
            return os.kill(os.getpid(), signal.SIGTERM)
