"""Steps that last as long as an accelerator's might, on a machine without one.

The real engine serves real HTTP on the wall's clock, and a tiny model computes its tokens on the
CPU. But a step is over when the virtual clock's model of steps says so, and the next one is
scheduled meanwhile. So the scheduler, the API server and the client have the time that an
accelerator leaves them, and nothing depends on caches which they share with the forward pass on a
CPU. It says nothing about how fast an accelerator is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.manifest import write_json
from benchmarks.virtual_clock import StepShape
from benchmarks.wall_clock import WallClock

if TYPE_CHECKING:
    from benchmarks.serving import Clock

_TIMES_VARIABLE = "FASTSERVE_BENCHMARK_PACE"
_REPORT_VARIABLE = "FASTSERVE_BENCHMARK_PACE_REPORT"
_REPORT = "pace.json"
# vLLM may kill its engine before it has shut down, so a report is written while it serves.
_REPORT_SECONDS = 1.0


class Pace:
    """When steps end on a device that computes one after the other.

    Args:
        times: how many times as long as on the virtual clock a step takes.
        clock: the wall's, but in tests.
        report: file for the two figures below, written about every second; None: none.

    Attributes:
        computed_s: what all steps were to take.
        held_up_s: how long the machine was too slow for that: steps that were handed over after
            the end of one whose output was still to be taken, and outputs that were not there.
    """

    def __init__(self, times: float, clock: Clock, report: Path | None = None) -> None:
        self.computed_s = 0.0
        self.held_up_s = 0.0
        self._times = times
        self._clock = clock
        self._report = report
        self._free_s = self._reported_s = clock()
        self._to_take = 0

    def begin(self, shape: StepShape) -> float:
        """Hand the device a step; the moment at which it is to have computed it."""
        now_s = self._clock()
        if self._to_take:
            self.held_up_s += max(now_s - self._free_s, 0.0)
        step_s = self._times * shape.seconds
        self.computed_s += step_s
        self._free_s = max(self._free_s, now_s) + step_s
        self._to_take += 1
        return self._free_s

    def take(self, end_s: float) -> None:
        """Wait for the end of a step whose output is there."""
        self.held_up_s += max(self._clock() - end_s, 0.0)
        self._to_take -= 1
        if self._report is not None and end_s >= self._reported_s + _REPORT_SECONDS:
            self._reported_s = end_s
            totals = {"computed_s": self.computed_s, "held_up_s": self.held_up_s}
            write_json(self._report, totals)
        self._clock.advance_to(end_s)


def variables(times: float, folder: Path) -> dict[str, str]:
    """Environment of a server whose plugins include `platform` and that reports to `folder`."""
    report = folder / _REPORT
    # Of a server before.
    report.unlink(missing_ok=True)
    return {_TIMES_VARIABLE: str(times), _REPORT_VARIABLE: str(report.resolve())}


def pace_of_environment() -> Pace:
    """The pace that `variables` asked for."""
    report = Path(os.environ[_REPORT_VARIABLE])
    return Pace(float(os.environ[_TIMES_VARIABLE]), WallClock(), report)


def read_report(folder: Path) -> dict[str, float]:
    """A server's `computed_s` and `held_up_s` until now; nothing where there is no pace."""
    report = folder / _REPORT
    if not report.is_file():
        return {}
    totals: dict[str, float] = json.loads(report.read_text(encoding="utf-8"))
    return totals


def held_up_share(totals: Mapping[str, float]) -> dict[str, float]:
    """How much of the paced time the machine was too slow for, as a figure of a result.

    Nothing where no report says, as after less than a second.
    """
    if not totals.get("computed_s"):
        return {}
    return {"pace_held_up_share": totals["held_up_s"] / totals["computed_s"]}


def platform() -> str:
    """A platform plugin of vLLM's: the name of the class that is to be the platform."""
    return "benchmarks.paced_platform.PacedPlatform"
