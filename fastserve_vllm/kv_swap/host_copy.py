"""The requests' copies on the host."""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from fastserve_vllm.kv_swap.host_pool import ContentKey, HostPool
from fastserve_vllm.kv_swap.transfers import Direction, Transfer


class CopyState(Enum):
    """Where a request's KV is.

    `RETAINED`: on the device, and the host still has what it had. `SAVING`: likewise, and more of
    it is on its way to the host while the request runs on.
    """

    SAVING = "saving"
    SWAPPING_OUT = "swapping out"
    SWAPPED = "swapped"
    SWAPPING_IN = "swapping in"
    RETAINED = "retained"


MOVES = {
    CopyState.SAVING: Direction.OUT,
    CopyState.SWAPPING_OUT: Direction.OUT,
    CopyState.SWAPPING_IN: Direction.IN,
}
"""The states in which a copy is moving, and where to."""


@dataclass(slots=True, eq=False)
class HostCopy:
    """A request's copy on the host.

    Attributes:
        request_id: the request's id; a later request may come to have the same.
        state: see `CopyState`.
        tokens: the copy covers the first so many tokens, wherever it has a block. KV is
            append-only, so it stays valid for them.
        slots: host blocks by group and slot; None: the device had nothing there. Empty where
            nothing was copied yet, or nothing is held any more.
        flights: its transfers that have not settled. All but the last are urgent.
        cause: why it must not be used any more; None: it may be.
        lost: while it moves: without it, the request's KV is nowhere.
        discarded: the request is gone.
        saved_blocks: blocks copied in advance since the last swap-out.
    """

    request_id: str
    state: CopyState = CopyState.SWAPPED
    tokens: int = 0
    slots: list[list[int | None]] = field(default_factory=list)
    flights: "deque[Flight]" = field(default_factory=deque)
    cause: str | None = None
    lost: bool = False
    discarded: bool = False
    saved_blocks: int = 0

    @property
    def is_abandoned(self) -> bool:
        """Whether its request may have given up the device blocks that are being read."""
        if self.state is CopyState.SWAPPING_OUT:
            return self.cause is not None
        return self.state is CopyState.SAVING and (self.cause is not None or self.discarded)

    def blocks(self) -> list[int]:
        """The host blocks that it holds, once for each slot."""
        return [block for group in self.slots for block in group if block is not None]

    def trim(self, tokens: int, block_tokens: Sequence[int]) -> list[int]:
        """Cover no more than the first `tokens` tokens; returns the blocks that are left over."""
        left_over: list[int] = []
        if tokens < self.tokens:
            self.tokens = tokens
            for slots, size in zip(self.slots, block_tokens, strict=True):
                needed = -(-tokens // size)
                left_over += [block for block in slots[needed:] if block is not None]
                del slots[needed:]
        return left_over

    def forget_content(self, block: int) -> None:
        """The block is about to be copied again: no older transfer tells its content any more."""
        for flight in self.flights:
            flight.keys.pop(block, None)

    def urgent_loads(self, first: int = 0) -> list[int]:
        """Device blocks that its urgent transfers fill, from the id `first` on."""
        return [
            block
            for flight in self.flights
            for block in flight.transfer.device_blocks
            if flight.transfer.transfer_id >= first
            and flight.transfer.urgent
            and flight.transfer.direction is Direction.IN
        ]

    def unsent(self) -> "list[Flight]":
        """Its transfers that no worker knows of yet."""
        return [flight for flight in self.flights if not flight.sent]


@dataclass(frozen=True, slots=True)
class Completion:
    """A copy that is over, or an urgent one that turns out to have failed.

    Attributes:
        request_id: the request that it was begun for.
        direction: where it copied to.
        cause: why the host copy was dropped; None: it worked.
        discarded: the request is gone: its device blocks have to be freed now, nothing else.
        lost: the request's KV is nowhere any more, so it must recompute. With a cause and
            not lost, the device blocks that were to be copied out are still valid.
        transfer_id: the transfer; it tells two requests that had the same id apart.
    """

    request_id: str
    direction: Direction
    cause: str | None = None
    discarded: bool = False
    lost: bool = False
    transfer_id: int = -1


@dataclass(slots=True, eq=False)
class Flight:
    """A transfer on its way.

    Attributes:
        transfer: what is copied.
        copy: whose it is, even if the request has another copy by now, or is gone.
        missing: workers that have not reported it.
        keys: content of the host blocks that it fills, by block; known once it has worked.
        sent: whether it was handed to the workers.
        cause: why it failed on some worker.
    """

    transfer: Transfer
    copy: HostCopy
    missing: int
    keys: dict[int, ContentKey] = field(default_factory=dict)
    sent: bool = False
    cause: str | None = None

    def completion(self, cause: str | None, *, lost: bool = False) -> Completion:
        """What is told of its end."""
        transfer, copy = self.transfer, self.copy
        return Completion(
            copy.request_id, transfer.direction, cause, copy.discarded, lost, transfer.transfer_id
        )


class HostCopies:
    """The live requests' copies; those that are retained and at rest can be reclaimed.

    Args:
        pool: the host's blocks.
    """

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._copies: dict[str, HostCopy] = {}
        # The least recently used first.
        self._idle: dict[HostCopy, None] = {}

    def __iter__(self) -> Iterator[HostCopy]:
        """All of them; they may be removed meanwhile."""
        return iter(list(self._copies.values()))

    def __contains__(self, copy: HostCopy) -> bool:
        return self._copies.get(copy.request_id) is copy

    def get(self, request_id: str) -> HostCopy | None:
        """The request's copy; None: it has none."""
        return self._copies.get(request_id)

    def add(self, copy: HostCopy) -> None:
        """The copy is the request's from now on, and in use."""
        self._copies[copy.request_id] = copy
        self._wake(copy)

    def remove(self, copy: HostCopy) -> None:
        """Forget the copy. Its transfers hold their blocks until they have landed."""
        self.empty(copy)
        del self._copies[copy.request_id]

    def empty(self, copy: HostCopy) -> None:
        """The copy covers nothing any more; what its transfers bring is not wanted."""
        self._wake(copy)
        self._pool.drop(copy.blocks())
        copy.slots, copy.tokens = [], 0
        for flight in copy.flights:
            flight.keys.clear()

    def spoil(self, copy: HostCopy, cause: str) -> None:
        """The copy is of no use, but stays known until its transfers are over."""
        copy.cause = copy.cause or cause
        self.empty(copy)

    def rest(self, copy: HostCopy) -> None:
        """A retained copy may be reclaimed from now on, if nothing is in flight."""
        if copy.state is CopyState.RETAINED and not copy.flights:
            self._idle[copy] = None
            self._pool.mark_idle(copy.blocks())

    def idle_blocks(self, copy: HostCopy) -> list[int]:
        """The copy's blocks if it may be reclaimed."""
        return copy.blocks() if copy in self._idle else []

    def reclaim(self) -> None:
        """Drop the copy that has been at rest for longest."""
        self.remove(next(iter(self._idle)))

    def check_integrity(self) -> None:
        """Law I1: every copy's state is what its transfers say.

        Raises:
            AssertionError: naming the law.
        """
        assert self._idle.keys() <= set(self._copies.values()), "I1: a dropped copy is at rest"
        for request_id, copy in self._copies.items():
            what = f"I1: the copy of {request_id}"
            assert copy.request_id == request_id, f"{what} is another's"
            assert not copy.discarded, f"{what} was discarded"
            transfers = [flight.transfer for flight in copy.flights]
            moving = [transfer.direction for transfer in transfers if not transfer.urgent]
            expected = [MOVES[copy.state]] if copy.state in MOVES else []
            assert moving == expected, f"{what}: {copy.state} while {moving} are in flight"
            assert not moving or not transfers[-1].urgent, f"{what} went on while it was moving"
            resting = copy.state is CopyState.RETAINED and not copy.flights
            assert (copy in self._idle) == resting, f"{what} is reclaimable xor in use"
            assert copy.cause is None or moving, f"{what} is of no use to anybody"
            assert copy.cause is None or not copy.slots, f"{what} is spoiled and holds blocks"

    def count_blocks(self) -> tuple[Counter[int], Counter[int]]:
        """How often copies hold each block, and how often those at rest do."""
        holders: Counter[int] = Counter()
        idle: Counter[int] = Counter()
        for copy in self:
            holders.update(copy.blocks())
            idle.update(self.idle_blocks(copy))
        return holders, idle

    def _wake(self, copy: HostCopy) -> None:
        if copy in self._idle:
            del self._idle[copy]
            self._pool.mark_busy(copy.blocks())
