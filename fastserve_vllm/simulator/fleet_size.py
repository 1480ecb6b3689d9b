"""How many replicas a trace and its targets need."""

from collections.abc import Callable


def fewest_replicas(meets: Callable[[int], bool], least: int, most: int) -> int | None:
    """The size of a fleet that meets its targets, where one replica fewer does not.

    More replicas nearly always help, but not by a law: who shares a replica with whom changes with
    their number, so one fleet may meet a target by luck that the next larger one misses. So a size
    is taken only if the next one meets the targets, too, and every size that the answer rests on
    was tried: itself, the one below and the one above. Where `meets` is monotone, that is the
    smallest.

    Args:
        meets: whether so many replicas do; asked once for each number.
        least: the smallest number to try.
        most: the largest number to try.

    Returns:
        The number; None: none from `least` to `most` was found.
    """
    known: dict[int, bool] = {least - 1: False}

    def holds(size: int) -> bool:
        if size not in known:
            known[size] = meets(size)
        return known[size]

    low, high = least - 1, least
    while True:
        low, high = _bracket(holds, low, high, most)
        if high > most:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        if high == most or holds(high + 1):
            return high
        low, high = high + 1, high + 2


def _bracket(holds: Callable[[int], bool], low: int, high: int, most: int) -> tuple[int, int]:
    """The largest size known to fail, and the next tried one that holds; beyond `most`: none."""
    stride = max(high // 8, 1)
    while high <= most and not holds(high):
        low, high, stride = high, min(high + stride, max(most, high + 1)), 2 * stride
    return low, high
