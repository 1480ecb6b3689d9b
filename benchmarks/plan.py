"""What one measured point is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.alone import Alone
from benchmarks.engine import EngineShape
from benchmarks.systems import System
from benchmarks.workload import Request

ClockName = Literal["virtual", "wall"]


@dataclass(frozen=True)
class Plan:
    """One system that serves one seed's requests at one load.

    Attributes:
        load: arrival rate over capacity; None: all requests are present at the start.
        rate_rps: arrivals a second; None likewise.
        alone: the baseline's latency of a request alone; None: the one measured on this engine.
        copy_ratio: virtual time: seconds of copying a token over those of prefilling it.
    """

    system: System
    shape: EngineShape
    requests: tuple[Request, ...]
    seed: int
    clock: ClockName
    load: float | None = None
    rate_rps: float | None = None
    alone: Alone | None = None
    copy_ratio: float = 0.1
