"""The host's blocks: who holds each of them, and which content is there already."""

from collections import Counter
from collections.abc import Collection, Hashable, Iterable

ContentKey = tuple[int, Hashable]
"""KV cache group, and the content key that the group's block has in the prefix cache."""


class HostPool:
    """Counts the holders of every host block; a block without any is free.

    A request's copy holds a block once for each slot that the block fills, and a transfer in
    flight holds the blocks that it reads or writes. A copy may be idle: it can be dropped for its
    room. Blocks that only idle copies hold are reclaimable. Every operation costs O(1) a block.

    Content that was published under its key is never overwritten: the key goes when the block
    does. Blocks without a key have one copy at most that holds them.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_reclaimable = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders = [0] * num_blocks
        self._idle = [0] * num_blocks
        self._by_key: dict[ContentKey, int] = {}
        self._keys: dict[int, ContentKey] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """A free block, held once.

        Raises:
            IndexError: there is none.
        """
        block = self._free.pop()
        self._holders[block] = 1
        return block

    def hold(self, blocks: Iterable[int]) -> None:
        """Hold each of the blocks, which somebody holds already, once more."""
        for block in blocks:
            self.num_reclaimable -= self._reclaimable(block)
            self._holders[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """Hold each of the blocks once less; free those that nobody holds any more."""
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block]:
                self.num_reclaimable += self._reclaimable(block)
            else:
                self._forget(block)
                self._free.append(block)

    def mark_idle(self, blocks: Iterable[int]) -> None:
        """A copy that holds the blocks turned idle."""
        for block in blocks:
            self._idle[block] += 1
            self.num_reclaimable += self._reclaimable(block)

    def mark_busy(self, blocks: Iterable[int]) -> None:
        """A copy that holds the blocks is idle no more."""
        for block in blocks:
            self.num_reclaimable -= self._reclaimable(block)
            self._idle[block] -= 1

    def room(
        self, own_idle: Collection[int], shared: Collection[int], released: Iterable[int]
    ) -> int:
        """Blocks that can be had for a copy, if need be by dropping all other idle ones.

        Args:
            own_idle: blocks of the copy itself, where it is idle: they are not reclaimed.
            shared: blocks that it is about to hold too.
            released: blocks that it is about to drop.
        """
        own, kept = set(own_idle), set(shared)
        room = self.num_free + self.num_reclaimable
        room -= sum(self._reclaimable(block) for block in own | kept)
        for block in released:
            others = self._holders[block] - 1
            room += block not in kept and others == self._idle[block] - (block in own)
        return room

    def find(self, key: ContentKey) -> int | None:
        """The block with this content, or None."""
        return self._by_key.get(key)

    def is_published(self, block: int) -> bool:
        """Whether others may come to hold the block for its content."""
        return block in self._keys

    def publish(self, block: int, key: ContentKey) -> None:
        """The held block has this content, completely and on every worker; the first one counts."""
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def forget_content(self) -> None:
        """No content is known any more. The caller has dropped every copy."""
        self._by_key.clear()
        self._keys.clear()

    def check_integrity(self, holders: Counter[int], idle: Counter[int]) -> None:
        """Law I4 for the host: every block is free, or held exactly by those who say so.

        Args:
            holders: how often copies and transfers say that they hold each block.
            idle: how often idle copies do.

        Raises:
            AssertionError: naming the law.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "I4: a host block is free twice"
        for block in range(self.num_blocks):
            count = self._holders[block]
            assert count == holders[block], f"I4: host block {block} miscounts its holders"
            assert (count == 0) == (block in free), f"I4: host block {block} is free xor held"
            assert self._idle[block] == idle[block], f"I4: host block {block}: idle holders"
        reclaimable = sum(map(self._reclaimable, range(self.num_blocks)))
        assert self.num_reclaimable == reclaimable, "I4: reclaimable host blocks miscounted"
        assert not free & self._keys.keys(), "I4: a free host block is known by its content"
        inverse = {block: key for key, block in self._by_key.items()}
        assert inverse == self._keys, "I4: content keys and blocks disagree"

    def _reclaimable(self, block: int) -> bool:
        return 0 < self._holders[block] == self._idle[block]

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._by_key[key]
