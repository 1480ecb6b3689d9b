"""Wall time in the shape of `VirtualClock`: what is due later is slept for."""

from __future__ import annotations

import time


class WallClock:
    """Seconds since it was made. Calling it reads the time."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    def __call__(self) -> float:
        """Read the time."""
        return time.perf_counter() - self._began_s

    def advance_to(self, moment_s: float) -> None:
        """Sleep until a moment; a moment in the past changes nothing."""
        time.sleep(max(moment_s - self(), 0.0))
