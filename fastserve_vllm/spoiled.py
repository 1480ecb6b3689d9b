"""What a failed copy spoils: the blocks it should have filled, and all that was computed on them.

Steps overlap: until the step that carried a copy reports, others are planned that compute on what
the copy brings, share its blocks through the prefix cache, or copy them to the host. A copy that a
step waits for fails in the report of that very step at the latest, so nothing of this has been
delivered when it becomes known, and all of it can be taken back.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.request import Request

if TYPE_CHECKING:
    from fastserve_vllm.scheduler import FastServeScheduler


class Table(NamedTuple):
    """Device blocks that a request holds, or held while a step in flight computed on them.

    Attributes:
        request: whose they are.
        groups: block ids by KV cache group, in the order of positions.
        steps: steps that had been scheduled when it left them; None: it holds them.
    """

    request: Request
    groups: tuple[list[int], ...]
    steps: int | None = None


class BlockHistory:
    """Remembers who held which blocks while steps in flight compute on them.

    Args:
        scheduler: whose requests they are.
    """

    def __init__(self, scheduler: "FastServeScheduler") -> None:
        self._scheduler = scheduler
        kv_cache_config = scheduler.kv_cache_config
        self._sizes = [g.kv_cache_spec.block_size for g in kv_cache_config.kv_cache_groups]
        self._null_block = scheduler.kv_cache_manager.block_pool.null_block.block_id
        self._left: deque[Table] = deque()
        self._scheduled = 0
        self._ended = 0

    def step_scheduled(self) -> None:
        """A step is in flight."""
        self._scheduled += 1

    def step_ended(self) -> None:
        """The oldest step in flight has ended: nobody can have left blocks to one before it."""
        self._ended += 1
        while self._left and (self._left[0].steps or 0) < self._ended:
            self._left.popleft()

    def leaving(self, request: Request) -> None:
        """The request's blocks are about to be freed."""
        if request.num_in_flight_tokens:
            self._left.append(Table(request, self._groups(request), self._scheduled))

    def spread(
        self, blocks: set[int], loads: Callable[[str], Iterable[int]]
    ) -> list[tuple[Request, bool]]:
        """Follow spoiled blocks through everything that was computed on them.

        A block that has had several owners since counts as spoiled for all of them: too much is
        computed again then, and nothing too little.

        Args:
            blocks: spoiled blocks; becomes all that may be spoiled.
            loads: device blocks that copies in flight fill from a request's host copy.

        Returns:
            Requests that computed on spoiled blocks, or hold some now; and whether they do.
        """
        found: dict[Request, bool] = {}
        tables = [*self._held(), *self._left]
        spreads = True
        while spreads:
            spreads = False
            for table in tables:
                after = self._computed_on(table, blocks)
                if not after:
                    continue
                spreads = True
                held = table.steps is None
                found[table.request] = found.get(table.request, False) or held
                blocks.update(after, loads(table.request.request_id))
                tables = [other for other in tables if other is not table]
        return list(found.items())

    def _computed_on(self, table: Table, blocks: set[int]) -> list[int]:
        """The table's blocks from the first spoiled one on; empty if there is none."""
        starts = [
            i * size
            for group, size in zip(table.groups, self._sizes, strict=True)
            for i, block in enumerate(group)
            if block in blocks
        ]
        if not starts:
            return []
        return [
            block
            for group, size in zip(table.groups, self._sizes, strict=True)
            for block in group[min(starts) // size :]
            if block != self._null_block
        ]

    def _held(self) -> Iterable[Table]:
        for request in self._scheduler.requests.values():
            yield Table(request, self._groups(request))

    def _groups(self, request: Request) -> tuple[list[int], ...]:
        groups: tuple[list[int], ...]
        groups = self._scheduler.kv_cache_manager.get_block_ids(request.request_id)
        return groups
