"""How a request's copy comes to cover more tokens: host blocks are found, shared and taken."""

from typing import NamedTuple

from fastserve_vllm.kv_swap.counters import SwapCounters
from fastserve_vllm.kv_swap.host_copy import CopyState, HostCopies, HostCopy
from fastserve_vllm.kv_swap.host_pool import ContentKey, HostPool
from fastserve_vllm.kv_swap.in_flight import InFlight
from fastserve_vllm.kv_swap.swap_plan import BlockKeys, BlockTable, Layout, OutPlan
from fastserve_vllm.kv_swap.transfers import Direction


class Begun(NamedTuple):
    """A copy that covers the tokens, once its transfer has worked.

    Attributes:
        copy: the request's copy.
        plan: what is done, slot by slot.
        host_blocks: the host blocks to be filled, in the order of the plan's places.
        names: the content that the full ones of them will have.
    """

    copy: HostCopy
    plan: OutPlan
    host_blocks: list[int]
    names: dict[int, ContentKey]

    @property
    def device_blocks(self) -> list[int]:
        """The device blocks to be read, likewise."""
        return [place.device_block for place in self.plan.places]


class Outbound:
    """Makes room on the host for what is about to be copied there.

    Args:
        layout: how block tables are laid out.
        pool: the host's blocks.
        copies: the live requests' copies.
        in_flight: the transfers on their way.
        counters: counts what found no room, and what was reclaimed.
    """

    def __init__(
        self,
        layout: Layout,
        pool: HostPool,
        copies: HostCopies,
        in_flight: InFlight,
        counters: SwapCounters,
    ) -> None:
        self._layout = layout
        self._pool = pool
        self._copies = copies
        self._in_flight = in_flight
        self._counters = counters

    def copy_of(self, request_id: str) -> HostCopy:
        """The copy of a request whose KV is on the device; a new one where there is none.

        Raises:
            ValueError: the KV is not on the device.
        """
        copy = self._copies.get(request_id) or HostCopy(request_id, CopyState.RETAINED)
        if copy.state is not CopyState.RETAINED:
            raise ValueError(f"{request_id} cannot be swapped out: it is {copy.state.value}")
        return copy

    def has_room(
        self, request_id: str, blocks: BlockTable, tokens: int, keys: BlockKeys = ()
    ) -> bool:
        """Whether `begin` would succeed now. Changes nothing."""
        copy = self.copy_of(request_id)
        if not copy.flights and self._layout.most_blocks(tokens) <= self._pool.num_free:
            return True
        return self._fits(copy, self.plan(copy, blocks, tokens, keys), tokens)

    def begin(
        self, request_id: str, blocks: BlockTable, tokens: int, keys: BlockKeys
    ) -> Begun | None:
        """Make the request's copy cover the tokens; None, and nothing has changed: no room."""
        copy = self.copy_of(request_id)
        plan = self.plan(copy, blocks, tokens, keys)
        if not self._fits(copy, plan, tokens):
            self._counters.no_room += 1
            return None
        # What a swap-in has not brought yet, the host alone has.
        copy.lost = self._in_flight.withdraw(copy, Direction.IN)
        self._copies.add(copy)
        host_blocks, names = self._take_blocks(copy, plan)
        copy.slots, copy.tokens = plan.slots, tokens
        return Begun(copy, plan, host_blocks, names)

    def plan(self, copy: HostCopy, blocks: BlockTable, tokens: int, keys: BlockKeys) -> OutPlan:
        """What brings the tokens to the host. Changes nothing."""
        return self._layout.plan_out(self._pool, copy, blocks, tokens, keys)

    def _fits(self, copy: HostCopy, plan: OutPlan, tokens: int) -> bool:
        unsent = [flight.transfer.direction for flight in copy.unsent()]
        if Direction.IN in unsent and tokens > copy.tokens:
            # The device does not have it yet, and the host not any more.
            return False
        if plan.fresh <= self._pool.num_free:
            return True
        own = self._copies.idle_blocks(copy)
        return plan.fresh <= self._pool.room(own, plan.shared, plan.released)

    def _take_blocks(
        self, copy: HostCopy, plan: OutPlan
    ) -> tuple[list[int], dict[int, ContentKey]]:
        """Give every place of the plan its block; returns the blocks, and the keys of full ones."""
        self._pool.hold(plan.shared)
        self._pool.drop(plan.released)
        while plan.fresh > self._pool.num_free:
            self._copies.reclaim()
            self._counters.reclaimed_copies += 1
        host_blocks: list[int] = []
        names: dict[int, ContentKey] = {}
        for place in plan.places:
            block = plan.slots[place.group][place.slot]
            if block is None:
                block = plan.slots[place.group][place.slot] = self._pool.take()
            else:
                copy.forget_content(block)
            host_blocks.append(block)
            if place.key is not None:
                names[block] = place.key
        return host_blocks, names
