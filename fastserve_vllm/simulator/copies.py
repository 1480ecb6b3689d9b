"""Copies between device and host: one channel in each direction, first come first served."""

import heapq
from dataclasses import dataclass
from itertools import count

from fastserve_vllm.policy.job import Job


@dataclass(slots=True)
class Copy:
    """A copy in flight; `job` is None once nobody waits for it."""

    job: Job | None
    blocks: int


class CopyChannels:
    """Says when copies end.

    Args:
        block_s: seconds that a channel takes for one block.
    """

    def __init__(self, block_s: float) -> None:
        self.block_s = block_s
        self._free_s = {"out": 0.0, "in": 0.0}
        self._flights: list[tuple[float, int, Copy]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def next_end_s(self) -> float:
        """When the next copy ends; there must be one."""
        return self._flights[0][0]

    def begin(self, copy: Copy, direction: str, now_s: float) -> None:
        """Start a copy that nothing waits for."""
        end_s = self._take(copy.blocks, direction, now_s)
        heapq.heappush(self._flights, (end_s, next(self._numbers), copy))

    def wait(self, blocks: int, direction: str, now_s: float) -> float:
        """When a copy ends that the step of `now_s` waits for."""
        return self._take(blocks, direction, now_s)

    def ended(self, now_s: float) -> list[Copy]:
        """Remove and return the copies that have ended, in order."""
        done = []
        while self._flights and self._flights[0][0] <= now_s:
            done.append(heapq.heappop(self._flights)[2])
        return done

    def _take(self, blocks: int, direction: str, now_s: float) -> float:
        end_s = max(self._free_s[direction], now_s) + blocks * self.block_s
        self._free_s[direction] = end_s
        return end_s
