import json

from jaxgen.storage import as_path
from jaxgen.train.logging import MetricsLog, duration, progress_line


def test_lines_beyond_the_restored_step_are_gone(tmp_path):
    log = MetricsLog(as_path(tmp_path), 0)
    for step in range(1, 6):
        log.write(step, {"loss": step / 3})
    log.flush()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    again = MetricsLog(as_path(tmp_path), 3)
    again.write(4, {"loss": 0.1})
    again.flush()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["loss"] == 2 / 3  # to the last bit
    assert lines[3]["loss"] == 0.1


def test_the_line_on_the_screen():
    values = {"loss": 0.5, "step_ms": 500.0, "images_per_sec": 128.0, "gflops": 90.0}
    assert progress_line(40, 100, values) == "step 40/100  loss 0.5000  128 images/s  90 GFLOP/s  30s left"
    assert "MFU 52.5%" in progress_line(1, 2, values | {"mfu": 0.525})
    assert [duration(s) for s in (9.4, 61, 3700)] == ["9s", "1m01s", "1h01m"]
