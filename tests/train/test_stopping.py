import http.server
import os
import signal
import threading
import time

import pytest

from jaxgen.train.stopping import stopping


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_the_handlers_are_put_back(number, capsys):
    before = handlers()
    with stopping() as asked:
        assert not asked(1)
        os.kill(os.getpid(), number)
        assert asked(2)
        assert asked(3)
    assert handlers() == before
    assert capsys.readouterr().err == "stopping: saving after this step\n"


def test_a_second_interrupt_interrupts_at_once():
    before = handlers()
    with stopping() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_a_notice_of_preemption_asks_to_stop(capsys):
    """Google Cloud's metadata server as it answers: FALSE, an error, and then the notice."""
    answers = [b"FALSE", None, b"TRUE"]

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(200 if answer and self.headers["Metadata-Flavor"] == "Google" else 503)
            self.end_headers()
            self.wfile.write(answer or b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with stopping(f"http://localhost:{server.server_port}/preempted") as asked:
            until = time.monotonic() + 60
            while not asked(1) and time.monotonic() < until:
                time.sleep(0.02)
            assert asked(1)
    finally:
        server.shutdown()
    assert "about to be taken away" in capsys.readouterr().err
