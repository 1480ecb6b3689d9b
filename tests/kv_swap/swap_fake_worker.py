"""Device memory, its allocator, and workers that copy when they please and sometimes fail."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from random import Random

from fastserve_vllm.kv_swap.transfers import Direction, Report, Transfer

NULL = 0
POISON = -1
"""What a token's place holds that nobody may read."""
Memory = list[list[int]]


@dataclass
class FakeWorker:
    """One worker's memory: a number for each token, by block; and what it has yet to do.

    Attributes:
        device: content of the device blocks; host: of its host blocks.
        queue: transfers handed over and not copied. done: copied and not reported, with causes.
    """

    device: Memory
    host: Memory
    queue: list[Transfer] = field(default_factory=list)
    done: list[tuple[int, str | None]] = field(default_factory=list)

    @classmethod
    def make(cls, device_blocks: int, host_blocks: int, size: int) -> "FakeWorker":
        return cls(
            [[POISON] * size for _ in range(device_blocks)],
            [[POISON] * size for _ in range(host_blocks)],
        )

    def copy(self, transfer: Transfer, *, fail: bool = False) -> None:
        """Copy whole blocks; a copy that fails leaves its target unreadable."""
        out = transfer.direction is Direction.OUT
        for device_block, host_block in zip(
            transfer.device_blocks, transfer.host_blocks, strict=True
        ):
            content = self.device[device_block] if out else self.host[host_block]
            content = [POISON] * len(content) if fail else content.copy()
            if out:
                self.host[host_block] = content
            else:
                self.device[device_block] = content
        cause = f"transfer {transfer.transfer_id} broke" if fail else None
        self.done.append((transfer.transfer_id, cause))

    def report(self, pick: Random) -> Report:
        """Some of what was done, in any order; each of it once."""
        pick.shuffle(self.done)
        number = pick.randint(0, len(self.done))
        told, self.done = self.done[:number], self.done[number:]
        return Report(
            done={number: 1 for number, _ in told},
            failed={number: cause for number, cause in told if cause is not None},
        )


class FakeDevice:
    """Device blocks and who holds them, with a prefix cache over those in use."""

    def __init__(self, num_blocks: int, workers: list[FakeWorker]) -> None:
        self.workers = workers
        self.free = list(range(1, num_blocks))
        self.holders = [0] * num_blocks
        self.cached: dict[Hashable, int] = {}
        self.keys: dict[int, Hashable] = {}
        # Blocks that an urgent copy has yet to read: nobody computes before it has.
        self.guarded: set[int] = set()
        self.stale: list[int] = []

    def take(self, number: int) -> list[int]:
        assert len(self.free) >= number
        blocks = [self.free.pop(0) for _ in range(number)]
        for block in blocks:
            self.holders[block] = 1
        return blocks

    def share(self, block: int) -> int:
        self.holders[block] += 1
        return block

    def drop(self, blocks: Iterable[int]) -> None:
        """Give blocks up; what nobody holds is poisoned as soon as somebody could write to it."""
        for block in blocks:
            if block == NULL:
                continue
            self.holders[block] -= 1
            if self.holders[block]:
                continue
            self.cached.pop(self.keys.pop(block, None), None)
            self.free.append(block)
            if block in self.guarded:
                self.stale.append(block)
            else:
                self.poison(block)

    def poison(self, block: int) -> None:
        for worker in self.workers:
            worker.device[block] = [POISON] * len(worker.device[block])

    def compute_begins(self) -> None:
        """Whoever got a block that an urgent copy has read may write to it now."""
        for block in self.stale:
            self.poison(block)
        self.stale.clear()
        self.guarded.clear()

    def publish(self, key: Hashable, block: int) -> None:
        if key not in self.cached and block not in self.keys:
            self.cached[key] = block
            self.keys[block] = key

    def forget_content(self) -> None:
        self.cached.clear()
        self.keys.clear()

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Law I4 for the device: every block is free, or held by those whose tables have it."""
        holders = [0] * len(self.holders)
        for table in tables:
            for block in table:
                holders[block] += block != NULL
        assert holders == self.holders
        assert sorted(self.free) == [b for b in range(1, len(holders)) if not holders[b]]
