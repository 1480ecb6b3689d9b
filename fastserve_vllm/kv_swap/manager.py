"""The scheduler's side of the KV swap: the host pool, every request's copy, what is in flight.

Nothing is copied here. A swap becomes a `Transfer`, `take_transfers` hands it to the workers, and
`report` takes in what they did. What is relied on:

- An urgent transfer out is ordered before everything else that is handed over with or after it,
  an urgent one in before the step's compute. They count as done at once, but may still fail.
- The others are copied at any time between being handed over and being reported, in any order.
  Until then their device blocks are neither freed nor written.
- Every worker reports every transfer exactly once.
"""

from collections.abc import Sequence

from fastserve_vllm.kv_swap.counters import SwapCounters
from fastserve_vllm.kv_swap.host_copy import (
    MOVES,
    Completion,
    CopyState,
    Flight,
    HostCopies,
    HostCopy,
)
from fastserve_vllm.kv_swap.host_pool import HostPool
from fastserve_vllm.kv_swap.in_flight import InFlight
from fastserve_vllm.kv_swap.outbound import Begun, Outbound
from fastserve_vllm.kv_swap.swap_plan import BlockKeys, BlockTable, Layout
from fastserve_vllm.kv_swap.transfers import Direction, Report, Transfer

__all__ = [
    "BlockKeys",
    "BlockTable",
    "Completion",
    "CopyState",
    "SwapCounters",
    "SwapManager",
]

INVALIDATED = "invalidated"


class SwapManager:
    """See the module. Operations cost O(blocks of the request), amortized over what they reclaim.

    A copy's transfers settle in the order in which they were begun: what was read from an urgent
    one, or computed on it, is believed only once every worker has reported that it worked.

    Args:
        host_blocks: blocks of every worker's host pool.
        block_tokens: tokens that a block holds, by KV cache group.
        workers: how many report each transfer.
        null_block: the device block that stands for nothing.
    """

    def __init__(
        self,
        host_blocks: int,
        block_tokens: Sequence[int],
        *,
        workers: int = 1,
        null_block: int = 0,
    ) -> None:
        self.counters = SwapCounters()
        self._layout = Layout(tuple(block_tokens), null_block)
        self._pool = HostPool(host_blocks)
        self._in_flight = InFlight(self._pool, workers)
        self._copies = HostCopies(self._pool)
        self._outbound = Outbound(
            self._layout, self._pool, self._copies, self._in_flight, self.counters
        )
        # Live requests that have been swapped out before, whatever became of the copy.
        self._returning: set[str] = set()

    # ---- what is known ------------------------------------------------------------------------

    @property
    def host_blocks(self) -> int:
        """Blocks of the host pool."""
        return self._pool.num_blocks

    @property
    def free_blocks(self) -> int:
        """Host blocks that nobody holds."""
        return self._pool.num_free

    @property
    def reclaimable_blocks(self) -> int:
        """Host blocks that would be free if every retained copy at rest were dropped."""
        return self._pool.num_reclaimable

    @property
    def in_flight(self) -> int:
        """Transfers begun that have not settled."""
        return len(self._in_flight)

    def in_flight_blocks(self) -> dict[str, int]:
        """Blocks of the transfers begun that have not settled, by `Direction.value`."""
        blocks = dict.fromkeys([direction.value for direction in Direction], 0)
        for flight in self._in_flight:
            blocks[flight.transfer.direction.value] += len(flight.transfer.device_blocks)
        return blocks

    def state(self, request_id: str) -> CopyState | None:
        """Where the request's KV is; None: the host has nothing of it that may be used."""
        copy = self._copies.get(request_id)
        return None if copy is None else copy.state

    def tokens(self, request_id: str) -> int:
        """Tokens that a swapped request can get back; 0 where there is none."""
        copy = self._copies.get(request_id)
        return copy.tokens if copy is not None and copy.state is CopyState.SWAPPED else 0

    def retained_tokens(self, request_id: str) -> int:
        """Tokens that the host has, or is about to have, of a request on the device."""
        copy = self._copies.get(request_id)
        return 0 if copy is None else copy.tokens

    def urgent_loads(self, request_id: str) -> list[int]:
        """Device blocks that urgent transfers, not settled yet, fill from the request's copy."""
        copy = self._copies.get(request_id)
        return [] if copy is None else copy.urgent_loads()

    def has_room(
        self, request_id: str, blocks: BlockTable, tokens: int, *, keys: BlockKeys = ()
    ) -> bool:
        """Whether `swap_out` would succeed now. Changes nothing."""
        if self.state(request_id) not in (None, CopyState.RETAINED):
            return False
        return self._outbound.has_room(request_id, blocks, tokens, keys)

    # ---- swapping -----------------------------------------------------------------------------

    def swap_out(
        self,
        request_id: str,
        blocks: BlockTable,
        tokens: int,
        *,
        keys: BlockKeys = (),
        urgent: bool = False,
    ) -> Transfer | None:
        """Bring the KV of the request's first `tokens` tokens to the host.

        Only what the host lacks is copied. A block that covers too little of its slot is copied
        again in place; a full one whose content is known to be in another copy is shared.

        Args:
            request_id: a request whose KV is on the device.
            blocks: its device blocks; the last one that counts may be partial.
            tokens: tokens that were computed.
            keys: content keys of its first full blocks.
            urgent: swapped at once, and the device blocks may be freed; otherwise only once every
                worker has reported.

        Returns:
            The transfer. If it is empty, the request is swapped at once and nothing is sent.
            None, and nothing has changed: the host has no room, even if it dropped the retained
            copies of all others; or a swap-in was begun in this very step and its copy invalidated.

        Raises:
            ValueError: the KV is not on the device, or the tables are too short.
        """
        begun = self._outbound.begin(request_id, blocks, tokens, keys)
        if begun is None:
            return None
        copy, at_once = begun.copy, urgent or not begun.host_blocks
        copy.state = CopyState.SWAPPED if at_once else CopyState.SWAPPING_OUT
        again = request_id in self._returning
        self.counters.count_out(begun.plan, copy.saved_blocks, again=again, urgent=urgent)
        copy.saved_blocks = 0
        self._returning.add(request_id)
        return self._fly_out(begun, urgent=urgent)

    def save(
        self, request_id: str, blocks: BlockTable, tokens: int, *, keys: BlockKeys = ()
    ) -> Transfer | None:
        """Copy full blocks in advance, of a request that may go on meanwhile.

        Full blocks are never written again, so this may run beside the steps that compute on them.
        Until every worker has reported, the request must keep them.

        Args:
            request_id: a request whose KV is on the device.
            blocks: its device blocks.
            tokens: tokens that were computed and fill whole blocks of every group.
            keys: content keys of its first full blocks.

        Returns:
            The transfer, possibly empty; None, and nothing has changed: as for `swap_out`, or the
            host has those tokens already.

        Raises:
            ValueError: the KV is not on the device, or the tables are too short.
        """
        if self._outbound.copy_of(request_id).tokens >= tokens:
            return None
        begun = self._outbound.begin(request_id, blocks, tokens, keys)
        if begun is None:
            return None
        copy = begun.copy
        copy.state = CopyState.SAVING if begun.host_blocks else CopyState.RETAINED
        copy.saved_blocks += len(begun.host_blocks)
        self.counters.count_save(begun.plan)
        transfer = self._fly_out(begun, urgent=False)
        self._copies.rest(copy)
        return transfer

    def _fly_out(self, begun: Begun, *, urgent: bool) -> Transfer:
        return self._in_flight.begin(
            begun.copy,
            Direction.OUT,
            begun.device_blocks,
            begun.host_blocks,
            keys=begun.names,
            urgent=urgent,
        )

    def swap_in(
        self,
        request_id: str,
        blocks: BlockTable,
        tokens: int | None = None,
        *,
        first_token: int = 0,
        urgent: bool = False,
    ) -> Transfer:
        """Bring a swapped request's KV back; the copy stays valid for the tokens it covers.

        Args:
            request_id: a swapped request.
            blocks: its new device blocks.
            tokens: tokens wanted, at most those of the copy; None: all. The copy's others are
                forgotten: they are not the request's any more (drafts that were rejected).
            first_token: a block boundary; the tokens before it are on the device already.
            urgent: retained at once; otherwise only once every worker has reported.

        Returns:
            The transfer. If it is empty, the request is retained at once and nothing is sent.

        Raises:
            ValueError: the request is not swapped; `first_token` is no block boundary; the tables
                are too short; or a block is to hold KV that the host does not have.
        """
        copy = self._copies.get(request_id)
        if copy is None or copy.state is not CopyState.SWAPPED:
            where = "nothing of it is on the host" if copy is None else f"it is {copy.state.value}"
            raise ValueError(f"{request_id} cannot be swapped in: {where}")
        wanted = copy.tokens if tokens is None else min(tokens, copy.tokens)
        device_blocks, host_blocks = self._layout.plan_in(copy, blocks, first_token, wanted)
        self._pool.drop(copy.trim(wanted, self._layout.block_tokens))
        self.counters.count_in(urgent=urgent)
        copy.state = CopyState.RETAINED if urgent or not host_blocks else CopyState.SWAPPING_IN
        transfer = self._in_flight.begin(
            copy, Direction.IN, device_blocks, host_blocks, urgent=urgent
        )
        self._copies.rest(copy)
        return transfer

    def discard(self, request_id: str) -> Direction | None:
        """The request finished or was aborted: give up its copy.

        What was not handed to the workers yet is withdrawn.

        Returns:
            The direction of a copy in flight that needs the request's device blocks until its
            `Completion`, which says `discarded`; None: they may be freed now.
        """
        self._returning.discard(request_id)
        copy = self._copies.get(request_id)
        if copy is None:
            return None
        copy.discarded = True
        self._drop(copy)
        last = copy.flights[-1].transfer if copy.flights else None
        return None if last is None or last.urgent else last.direction

    def invalidate(self, request_id: str) -> None:
        """The request's copy must not be used any more: the request recomputes.

        A copy that is moving is still reported as over, with a cause.
        """
        copy = self._copies.get(request_id)
        if copy is None:
            return
        if copy.state in MOVES:
            self._copies.spoil(copy, INVALIDATED)
        else:
            self._drop(copy)

    def invalidate_all(self) -> None:
        """No copy and no content key may be used any more, as when the weights change.

        Copies that are moving are still reported as over, with a cause. A request whose KV is on
        the device may go on, so it still hears of an urgent transfer that failed.
        """
        for copy in self._copies:
            if copy.state in MOVES:
                self._copies.spoil(copy, INVALIDATED)
            elif copy.state is CopyState.RETAINED and copy.flights:
                self._copies.empty(copy)
            else:
                self._drop(copy)
        self._pool.forget_content()

    # ---- to and from the workers --------------------------------------------------------------

    def take_transfers(self) -> tuple[Transfer, ...]:
        """The transfers begun since the last call, in order, for every worker."""
        transfers = self._in_flight.take()
        for transfer in transfers:
            self.counters.count_sent(transfer)
        return transfers

    def failing(self, report: Report) -> list[tuple[Flight, str]]:
        """The transfers that the report says have failed, and why, before it is taken in."""
        flights = {flight.transfer.transfer_id: flight for flight in self._in_flight}
        return [(flights[i], cause) for i, cause in report.failed.items() if i in flights]

    def report(self, report: Report) -> list[Completion]:
        """Take in what workers did.

        Returns:
            The copies that are over: those that were not urgent, and urgent ones that failed.

        Raises:
            ValueError: a transfer is not in flight, or more workers report it than there are.
        """
        completions: list[Completion] = []
        for copy in self._in_flight.note(report):
            while copy.flights and copy.flights[0].missing == 0:
                flight = copy.flights.popleft()
                self.counters.failed += flight.cause is not None
                completion = self._conclude(copy, flight)
                if completion is not None:
                    completions.append(completion)
                self._in_flight.land(flight)
        return completions

    # ---- the laws -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Law I4, and what I5 needs: host blocks are conserved, transfers do not collide.

        Costs O(everything).

        Raises:
            AssertionError: naming the law.
        """
        holders, idle = self._copies.count_blocks()
        for flight in self._in_flight:
            holders.update(flight.transfer.host_blocks)
        self._pool.check_integrity(holders, idle)
        self._in_flight.check_integrity()
        self._copies.check_integrity()

    # ---- the life of a copy -------------------------------------------------------------------

    def _conclude(self, copy: HostCopy, flight: Flight) -> Completion | None:
        """What the end of its oldest transfer means to a copy."""
        urgent, direction = flight.transfer.urgent, flight.transfer.direction
        if copy.discarded:
            return None if urgent else flight.completion(flight.cause)
        if copy not in self._copies:
            return None
        if flight.cause is not None:
            copy.lost |= urgent or direction is Direction.IN
            self._copies.spoil(copy, flight.cause)
        elif copy.cause is None:
            for block, key in flight.keys.items():
                self._pool.publish(block, key)
        if urgent and (copy.state in MOVES or flight.cause is None):
            # A failed one of a moving copy is told of when the copy has stopped moving.
            self._copies.rest(copy)
            return None
        return self._complete(copy, flight)

    def _complete(self, copy: HostCopy, flight: Flight) -> Completion:
        inward = flight.transfer.direction is Direction.IN
        if copy.cause is not None:
            self._drop(copy)
            return flight.completion(copy.cause, lost=copy.lost or inward)
        out = copy.state is CopyState.SWAPPING_OUT
        copy.state = CopyState.SWAPPED if out else CopyState.RETAINED
        self._copies.rest(copy)
        return flight.completion(None)

    def _drop(self, copy: HostCopy) -> None:
        """Forget the copy, and what the workers do not know of yet."""
        self._in_flight.withdraw(copy, *Direction)
        self._copies.remove(copy)
