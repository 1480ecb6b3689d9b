"""The shortest step that a machine really takes, told apart from steps that were timed wrongly."""

import bisect

_BLOCK = 64
# Of a block's times the sixth shortest counts: five wrong ones, 8 % of the steps, change nothing.
_RANK = 5


class ShortestStep:
    """The shortest time that has been confirmed by others.

    When the engine's process is held up, two overlapping steps may end at almost the same time, and
    a clock may be set back: single steps seem to take next to nothing. The ladder hangs on the
    shortest step, so a wrong one would shrink every quantum for good. Of each 64 times the sixth
    shortest is taken, and of these the least; until the first 64 are in, their sixth shortest,
    or the median where they are fewer than twelve.

    Args:
        known_s: the shortest step known already, in seconds.
    """

    def __init__(self, known_s: float | None = None) -> None:
        self._confirmed_s = known_s
        self._times_s: list[float] = []

    @property
    def seconds(self) -> float | None:
        """None until a step was seen."""
        times_s = self._times_s
        if self._confirmed_s is not None or not times_s:
            return self._confirmed_s
        return times_s[min(_RANK, len(times_s) // 2)]

    def observe(self, step_s: float) -> None:
        """Take in the time of one step."""
        bisect.insort(self._times_s, step_s)
        if len(self._times_s) < _BLOCK:
            return
        found_s = self._times_s[_RANK]
        known_s = self._confirmed_s
        self._confirmed_s = found_s if known_s is None else min(known_s, found_s)
        self._times_s.clear()
