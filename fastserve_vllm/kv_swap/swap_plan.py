"""What a swap has to copy, slot by slot."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fastserve_vllm.kv_swap.host_copy import HostCopy
from fastserve_vllm.kv_swap.host_pool import ContentKey, HostPool

BlockTable = Sequence[Sequence[int]]
"""A request's device blocks, one list for each KV cache group, in the order of positions."""
BlockKeys = Sequence[Sequence[Hashable]]
"""Content keys of its first full blocks, likewise; lists may be shorter, or missing."""


class Place(NamedTuple):
    """A slot to be copied, its device block, and the key of its content if it has one."""

    group: int
    slot: int
    device_block: int
    key: ContentKey | None


@dataclass(slots=True)
class OutPlan:
    """What a swap-out does, slot by slot.

    Attributes:
        slots: the copy's host blocks afterwards; None also where `places` needs a fresh one.
        places: what is copied.
        shared: blocks with known content that the copy comes to hold.
        released: blocks that it drops.
        kept: slots that the host has already.
        fresh: blocks to be taken from the pool.
    """

    slots: list[list[int | None]] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    kept: int = 0
    fresh: int = 0

    def keep(self, block: int) -> int:
        """Leave the slot as it is; returns its block."""
        self.kept += 1
        return block

    def fill(self, place: Place, mine: int | None, pool: HostPool) -> int | None:
        """Bring a slot to the host; returns its block, None for a fresh one.

        Args:
            place: the slot.
            mine: the copy's own block there, if it has one, which covers too little.
            pool: the host's blocks.
        """
        known = None if place.key is None else pool.find(place.key)
        if known is not None and known == mine:
            return self.keep(known)
        if known is not None:
            self.shared.append(known)
            return known
        self.places.append(place)
        if mine is not None and not pool.is_published(mine):
            return mine
        self.fresh += 1
        return None


@dataclass(frozen=True, slots=True)
class Layout:
    """How block tables are laid out.

    Attributes:
        block_tokens: tokens that a block holds, by KV cache group.
        null_block: the entry that stands for nothing.
    """

    block_tokens: tuple[int, ...]
    null_block: int

    def most_blocks(self, tokens: int) -> int:
        """Host blocks that a copy of so many tokens takes at most."""
        return sum(-(-tokens // size) for size in self.block_tokens)

    def plan_out(
        self, pool: HostPool, copy: HostCopy, blocks: BlockTable, tokens: int, keys: BlockKeys
    ) -> OutPlan:
        """What brings the first `tokens` tokens to the host; changes nothing.

        Raises:
            ValueError: the tables are too short, or there are too few.
        """
        plan = OutPlan()
        for group, table in enumerate(self._tables(copy.request_id, blocks, tokens)):
            held = copy.slots[group] if copy.slots else []
            names = keys[group] if group < len(keys) else ()
            slots: list[int | None] = []
            for slot, device_block in enumerate(table):
                mine = held[slot] if slot < len(held) else None
                end = (slot + 1) * self.block_tokens[group]
                block = None
                if device_block == self.null_block:
                    pass
                elif mine is not None and copy.tokens >= min(end, tokens):
                    block = plan.keep(mine)
                else:
                    key = (group, names[slot]) if end <= tokens and slot < len(names) else None
                    block = plan.fill(Place(group, slot, device_block, key), mine, pool)
                if mine is not None and mine != block:
                    plan.released.append(mine)
                slots.append(block)
            plan.released += [block for block in held[len(table) :] if block is not None]
            plan.slots.append(slots)
        return plan

    def plan_in(
        self, copy: HostCopy, blocks: BlockTable, first_token: int, tokens: int
    ) -> tuple[list[int], list[int]]:
        """The device and host blocks of the tokens from `first_token` up to `tokens`.

        Raises:
            ValueError: `first_token` is no block boundary, the tables do not fit, or a device
                block waits for KV that the host does not have.
        """
        device_blocks: list[int] = []
        host_blocks: list[int] = []
        if first_token >= tokens:
            return device_blocks, host_blocks
        for group, table in enumerate(self._tables(copy.request_id, blocks, tokens)):
            first, rest = divmod(first_token, self.block_tokens[group])
            if rest:
                raise ValueError(f"first_token {first_token} is inside a block of group {group}")
            for slot in range(first, len(table)):
                host_block = copy.slots[group][slot]
                if table[slot] == self.null_block:
                    continue
                if host_block is None:
                    where = f"group {group}, slot {slot}"
                    raise ValueError(f"{copy.request_id}: the host has no KV for {where}")
                device_blocks.append(table[slot])
                host_blocks.append(host_block)
        return device_blocks, host_blocks

    def _tables(self, request_id: str, blocks: BlockTable, tokens: int) -> list[Sequence[int]]:
        """The tables, without what lies beyond the first `tokens` tokens."""
        if len(blocks) != len(self.block_tokens):
            expected = len(self.block_tokens)
            raise ValueError(f"{request_id}: {len(blocks)} block tables, not {expected}")
        tables = []
        for group, size in enumerate(self.block_tokens):
            needed = -(-tokens // size)
            if len(blocks[group]) < needed:
                got = f"{len(blocks[group])} blocks in group {group}"
                raise ValueError(f"{request_id}: {got}, not the {needed} of {tokens} tokens")
            tables.append(blocks[group][:needed])
        return tables
