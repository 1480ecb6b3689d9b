"""The device's free blocks, least recently freed first, as vLLM reuses them.

A freed block keeps its content until it is reused. So a request that lost its blocks and comes back
soon finds the first of them in the prefix cache.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Freed:
    """Blocks freed together: a request's first ones, freed in reverse, so that the first go last.

    Attributes:
        blocks: how many are still free; 0 once all were reused or adopted.
    """

    blocks: int


class FreeBlocks:
    """Counts free blocks. Operations cost O(1), amortized."""

    def __init__(self, blocks: int) -> None:
        self.count = blocks
        # The last entry that nobody can adopt.
        self._dropped = Freed(blocks)
        self._queue = deque([self._dropped])

    def take(self, blocks: int) -> None:
        """Reuse the blocks that were freed first.

        Raises:
            RuntimeError: there are not as many, so the plan was wrong.
        """
        if blocks > self.count:
            raise RuntimeError("a plan needs more device blocks than there are")
        self.count -= blocks
        while blocks:
            first = self._queue[0]
            taken = min(first.blocks, blocks)
            first.blocks -= taken
            blocks -= taken
            if not first.blocks:
                self._queue.popleft()
        while self._queue and not self._queue[0].blocks:
            self._queue.popleft()

    def put(self, blocks: int) -> Freed:
        """Free blocks; `adopt` takes back what is not reused by then."""
        self.count += blocks
        freed = Freed(blocks)
        if blocks:
            self._queue.append(freed)
        return freed

    def drop(self, blocks: int) -> None:
        """Free blocks that nobody takes back; one entry holds all in a row."""
        if not blocks:
            return
        self.count += blocks
        if not self._queue or self._queue[-1] is not self._dropped:
            self._dropped = Freed(0)
            self._queue.append(self._dropped)
        self._dropped.blocks += blocks

    def adopt(self, freed: Freed, most: int) -> int:
        """Take back what is left of the blocks, `most` at most; returns how many."""
        blocks = min(freed.blocks, most)
        freed.blocks -= blocks
        self.count -= blocks
        return blocks
