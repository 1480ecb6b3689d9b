"""Device memory that a step leaves, and how much of it to keep ready for arrivals."""

from collections import deque
from dataclasses import dataclass


class BurstReserve:
    """Device blocks to keep ready for arrivals: what the largest recent burst of them asked for.

    Ready are blocks that are idle, or whose content the host has already.

    A burst is what arrives within `window` steps, the time in which leaving jobs free no block
    yet. The reserve follows the largest one and forgets it by half every `half_life` steps.
    """

    def __init__(self, *, window: int = 4, half_life: int = 256) -> None:
        self._recent: deque[int] = deque([0] * window, maxlen=window)
        self._sum = 0
        self._decay = 0.5 ** (1 / half_life)
        self._peak = 0.0
        # Steps without an arrival that the figures above have still to follow.
        self._calm_steps = 0

    def step(self, arrived_blocks: int) -> None:
        """A step was planned; jobs that want so many blocks arrived since the one before."""
        if not arrived_blocks:
            self._calm_steps += 1
            return
        self._catch_up()
        self._follow(arrived_blocks)

    def skip(self, steps: int) -> None:
        """So many steps were planned in which nobody arrived."""
        self._calm_steps += steps

    @property
    def blocks(self) -> int:
        """The reserve; 0 once arrivals have long stopped."""
        self._catch_up()
        return int(self._peak)

    def _catch_up(self) -> None:
        steps, self._calm_steps = self._calm_steps, 0
        for _ in range(min(steps, len(self._recent))):
            self._follow(0)
        self._peak *= self._decay ** max(steps - len(self._recent), 0)

    def _follow(self, arrived_blocks: int) -> None:
        self._sum += arrived_blocks - self._recent[0]
        self._recent.append(arrived_blocks)
        self._peak = max(self._peak * self._decay, float(self._sum))


class EventRate:
    """How often something happens, in events a step, forgotten by half every `half_life` steps."""

    def __init__(self, *, half_life: int = 64) -> None:
        self._decay = 0.5 ** (1 / half_life)
        self._new = 0
        self.per_step = 0.0

    def add(self, events: int = 1) -> None:
        """So many happened since the last step was planned."""
        self._new += events

    def step(self) -> None:
        """A step was planned."""
        self.per_step += (self._new - self.per_step) * (1 - self._decay)
        self._new = 0

    def skip(self, steps: int) -> None:
        """So many steps were planned in which nothing happened."""
        self.per_step *= self._decay**steps


@dataclass(slots=True)
class Room:
    """What a step leaves of the device, for those who come back.

    Attributes:
        idle_blocks: blocks that neither the step nor the growth of its jobs needs.
        freeing_blocks: blocks whose copies to the host are on their way.
        idle_slots: model-runner slots that nobody holds; None where waiting keeps none.
        freeing_slots: slots that come free with those copies.
    """

    idle_blocks: int
    freeing_blocks: int = 0
    idle_slots: int | None = None
    freeing_slots: int = 0

    def take(self, blocks: int) -> bool:
        """Give a job its blocks and a slot, if there are enough now."""
        if blocks > self.idle_blocks or (self.idle_slots is not None and self.idle_slots < 1):
            return False
        self.idle_blocks -= blocks
        if self.idle_slots is not None:
            self.idle_slots -= 1
        return True

    def free(self, blocks: int) -> None:
        """A job is on its way out."""
        self.freeing_blocks += blocks
        self.freeing_slots += 1

    def will_hold(self, blocks: int) -> bool:
        """Whether a job fits once everybody who is on the way out has left."""
        if self.idle_slots is not None and self.idle_slots + self.freeing_slots < 1:
            return False
        return blocks <= self.idle_blocks + self.freeing_blocks
