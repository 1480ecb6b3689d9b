"""Looks for the load at which a figure passes its limit, with few measurements."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

# Every system is measured at these, so that all can be compared there.
COMMON_LOADS = (1.0, 1.2)
# From one load to the next while the crossing is outside; neighbours closer than `CLOSE` need
# nothing between them.
STEP, CLOSE = 1.25, 1.13
LIMITS = (0.2, 4.0)


def search(excess: Callable[[float], float]) -> float | None:
    """The load at which `excess` first passes 1; None where it does not within `LIMITS`.

    `excess(load)` measures; it is called for `COMMON_LOADS` first.
    """
    found = {load: excess(load) for load in COMMON_LOADS}
    while True:
        load = _next(found)
        if load is None:
            return crossing(found)
        if not LIMITS[0] <= load <= LIMITS[1]:
            return None
        found[load] = excess(load)


def _next(found: Mapping[float, float]) -> float | None:
    """Where to measure next; None: the crossing is known closely enough."""
    pair = _enclosing(sorted(found), found)
    if pair is not None:
        low, high = pair
        return None if high / low < CLOSE else round(math.sqrt(low * high), 3)
    if found[min(found)] > 1:
        return round(min(found) / STEP, 3)
    return round(max(found) * STEP, 3)


def crossing(found: Mapping[float, float]) -> float | None:
    """Between the first two neighbours around 1, with the logarithm linear in the load."""
    pair = _enclosing(sorted(found), found)
    if pair is None:
        return None
    low, high = pair
    within, above = max(found[low], 1e-3), found[high]
    return low + (high - low) * math.log(1 / within) / math.log(above / within)


def _enclosing(loads: Sequence[float], found: Mapping[float, float]) -> tuple[float, float] | None:
    for low, high in itertools.pairwise(loads):
        if found[low] <= 1 < found[high]:
            return low, high
    return None
