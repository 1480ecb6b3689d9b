"""How much of the time may go to first tokens while others wait for their next ones."""

from dataclasses import dataclass


@dataclass(slots=True)
class FirstTokenShare:
    """A leaky bucket of the time for which first steps hold up the others.

    Where prompts are most of the work, a first token at once for everybody leaves too little for
    the answers: under overload they stand still, and every mean is worse but that of first tokens.

    Attributes:
        share: seconds of it that drain in a second.
    """

    share: float
    _level_s: float = 0.0
    _drained_at_s: float = 0.0

    def takes(self, hold_up_s: float, now_s: float, window_s: float) -> bool:
        """Whether there is room for so much, which is then taken.

        An empty bucket takes any; otherwise it holds what drains in `window_s` seconds.
        """
        drained_s = self.share * (now_s - self._drained_at_s)
        self._level_s, self._drained_at_s = max(self._level_s - drained_s, 0.0), now_s
        if hold_up_s and self._level_s and self._level_s + hold_up_s > self.share * window_s:
            return False
        self._level_s += hold_up_s
        return True
