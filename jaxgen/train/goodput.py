"""Goodput: the share of a run's wall time that went into steps which count, over all its starts."""

import time
from collections.abc import Mapping
from typing import Any

# What time goes to: steps that count; the way from a start to its first step; saves that the loop waits for; evaluations and
# samples; steps after the checkpoint that was gone on from; nothing running, after a crash.
PHASES = ("step", "restart", "save", "look", "lost", "down")
TOLD = ("goodput", *(f"{phase}_s" for phase in PHASES), "told_at")  # of a line of metrics.jsonl


class Goodput:
    """A clock that is always in one phase. Time between a run that was told to stop, and saved, and its next start is not
    counted: nobody wanted steps then."""

    def __init__(self, began: float, kept: Mapping[str, float] | None = None, told: Mapping[str, Any] | None = None):
        """began: time.monotonic() of this start. kept: `seconds` as of the checkpoint that is gone on from. told: what `told`
        gave last before the run ended, with whatever else stood in that line."""
        kept, told = kept or {}, told or {}
        self._spent = {phase: max(kept.get(phase, 0.0), told.get(f"{phase}_s", 0.0)) for phase in PHASES}
        lost = max(told.get("step_s", 0.0) - kept.get("step", 0.0), 0.0)
        if lost:
            self._spent["step"] -= lost
            self._spent["lost"] += lost
            self._spent["down"] += max(time.time() - (time.monotonic() - began) - told["told_at"], 0.0)
        self._phase, self._since = "restart", began

    def to(self, phase: str) -> None:
        """From now on time belongs to another phase."""
        now = time.monotonic()
        self._spent[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def seconds(self) -> dict[str, float]:
        """Of each phase, the present one's included."""
        self.to(self._phase)
        return dict(self._spent)

    def told(self) -> dict[str, float]:
        """For a line of metrics.jsonl: "goodput" in [0, 1], "step_s", "restart_s", … and the time of day in seconds."""
        spent = self.seconds()
        share = spent["step"] / max(sum(spent.values()), 1e-9)
        return {"goodput": share, **{f"{phase}_s": spent[phase] for phase in PHASES}, "told_at": time.time()}
