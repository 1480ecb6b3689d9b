"""The three settings in which systems are compared, as defaults of the command line."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.engine import blocks_at_full_length, fewest_kv_blocks
from benchmarks.workload import Request, TraceRow


@dataclass(frozen=True)
class Regime:
    """A batch limit, loads, and how much KV cache there is.

    Attributes:
        what: one line about it.
        batch: batch limit.
        loads: arrival rates over capacity.
        kv_share: KV blocks over the demand; None: enough for every request at once.
    """

    what: str
    batch: int
    loads: tuple[float, ...]
    kv_share: float | None = None


REGIMES = {
    "slots": Regime("batch places are short, KV cache ample", 16, (0.7, 0.9, 1.0, 1.2)),
    "kv": Regime("KV cache is short, so that preempting is dear", 64, (0.7, 0.9, 1.0, 1.2), 0.2),
    "idle": Regime("an engine with little to do", 16, (0.3,)),
}


def kv_demand(rows: Iterable[TraceRow], batch: int, block_size: int) -> int:
    """KV blocks that a full batch wants: of average requests, each at its full length.

    The average is the whole filtered trace's, so that it is the same for every seed.
    """
    return math.ceil(batch * _mean_blocks(rows, block_size))


def short_kv_blocks(share: float, demand: int, block_size: int, max_model_len: int) -> int:
    """A share of the demand; one longest request always fits."""
    return max(math.ceil(share * demand), fewest_kv_blocks(block_size, max_model_len))


def ample_kv_blocks(
    rows: Iterable[TraceRow],
    workloads: Iterable[Sequence[Request]],
    block_size: int,
    max_model_len: int,
) -> int:
    """Blocks with which no request ever waits for KV, even with all of them half done.

    Half more than the average sample holds, which is the same for every seed; more only for a
    sample that holds more than that.
    """
    workloads = list(workloads)
    most = max(sum(blocks_at_full_length(r, block_size) for r in w) for w in workloads)
    usual = 1.5 * max(map(len, workloads)) * _mean_blocks(rows, block_size)
    return max(most, math.ceil(usual)) + fewest_kv_blocks(block_size, max_model_len)


def _mean_blocks(rows: Iterable[TraceRow], block_size: int) -> float:
    return statistics.fmean(blocks_at_full_length(row, block_size) for row in rows)
