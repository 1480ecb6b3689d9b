"""What an engine held over a run: a bounded number of samples, however long the run."""

from __future__ import annotations

from typing import Any

SAMPLES = 256
COLUMNS = ("time_s", "requests", "device_blocks", "host_blocks", "blocks_out", "blocks_in")


class Timeline:
    """Samples a live scheduler once every so many steps.

    Whenever `SAMPLES` are exceeded twice, every other one goes and the distance doubles: what is
    left is evenly spread over the steps.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        exchange = getattr(scheduler, "exchange", None)
        self._swap = None if exchange is None else exchange.manager
        self._rows: list[tuple[float, ...]] = []
        self._distance = 1
        self._steps = 0
        self._now_s = 0.0

    def sample(self, now_s: float) -> None:
        """A step ended."""
        self._steps += 1
        self._now_s = now_s
        if self._steps % self._distance:
            return
        self._rows.append((now_s, *self._state()))
        if len(self._rows) == 2 * SAMPLES:
            self._rows = self._rows[1::2]
            self._distance *= 2

    def columns(self) -> dict[str, list[float]]:
        """Samples by column, the last step's too; the last two of `COLUMNS` count up."""
        rows = list(self._rows)
        if self._steps % self._distance:
            rows.append((self._now_s, *self._state()))
        return dict(zip(COLUMNS, (list(c) for c in zip(*rows, strict=True)), strict=False))

    def _state(self) -> tuple[float, ...]:
        # One block is vLLM's null block, which nobody uses.
        used = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
        requests = len(self._scheduler.requests)
        swap = self._swap
        if swap is None:
            return requests, used, 0, 0, 0
        held = swap.host_blocks - swap.free_blocks - swap.reclaimable_blocks
        return requests, used, held, swap.counters.blocks_out, swap.counters.blocks_in
