import pytest

from jaxgen.train import goodput
from jaxgen.train.goodput import PHASES, Goodput


class Clock:
    """Stands in for `time`: both its clocks go on only when told."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def spend(run, clock, **phases):
    for phase, seconds in phases.items():
        run.to(phase)
        clock.now += seconds


def test_time_belongs_to_the_phase_it_was_spent_in(clock):
    run = Goodput(clock.now - 10)  # ten seconds until there was a clock at all
    spend(run, clock, step=80, save=6, look=4)
    assert run.seconds() == {"step": 80, "restart": 10, "save": 6, "look": 4, "lost": 0, "down": 0}
    told = run.told()
    assert told["goodput"] == pytest.approx(0.8)
    assert told["save_s"] == 6
    assert told["told_at"] == clock.time()


def test_after_a_crash_work_is_lost_and_the_machine_was_down(clock):
    first = Goodput(clock.now)
    spend(first, clock, restart=10, step=40)
    kept = first.seconds()  # the checkpoint
    spend(first, clock, save=2, step=30)
    told = first.told()
    clock.now += 5  # not told of any more, then killed, then nothing for a while
    clock.now += 100
    began = clock.now
    clock.now += 3
    second = Goodput(began, kept, told)
    spend(second, clock, restart=7, step=40)
    assert second.seconds() == {"step": 80, "restart": 20, "save": 2, "look": 0, "lost": 30, "down": 105}
    assert second.told()["goodput"] == pytest.approx(80 / 237)


def test_a_pause_that_was_asked_for_is_not_counted(clock):
    first = Goodput(clock.now)
    spend(first, clock, restart=10, step=40)
    told = first.told()
    clock.now += 0.25  # from the line to the save
    kept = first.seconds()
    clock.now += 5000
    second = Goodput(clock.now, kept, told)
    assert second.seconds() == {"step": 40.25, "restart": 10, "save": 0, "look": 0, "lost": 0, "down": 0}


def test_a_run_of_an_older_version_begins_anew(clock):
    assert set(Goodput(clock.now, {}, {}).seconds()) == set(PHASES)
    assert sum(Goodput(clock.now, None, None).seconds().values()) == 0
