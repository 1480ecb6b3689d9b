"""What the copy engine moves a second, against one plain copy of as many pinned bytes.

The plain copy is of one contiguous tensor, timed by events of the device: what the link can do. The
engine copies blocks of KV cache as a worker lets it, and times itself, from its first byte to its
last, by events as well. Both take turns, so that a link that others use favours neither.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.llama_8b import BLOCK_BYTES, LAYER_BLOCK_BYTES, LAYERS

# How vLLM may place a block: a row in every layer's region, or one row that holds all layers.
# (regions, row bytes)
LAYOUTS = {"a row a layer": (LAYERS, LAYER_BLOCK_BYTES), "one row": (1, BLOCK_BYTES)}
PLACES = ("adjacent", "scattered")
WAYS = ("out", "in")
# What is timed in each turn: the link, the engine as it comes, and the engine without the
# driver's batches, as it runs where the driver has none.
METHODS = ("plain", "engine", "by_torch")


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """What is measured.

    Attributes:
        blocks: sizes of the transfers.
        repetitions: of each case; one more goes first and does not count.
        pool_blocks: blocks on either side, among which scattered ones are drawn.
    """

    blocks: tuple[int, ...]
    repetitions: int
    pool_blocks: int


@dataclass(frozen=True, slots=True)
class CopyCase:
    """One kind of transfer."""

    layout: str
    way: str
    place: str
    blocks: int


def cases(plan: CopyPlan) -> Iterator[CopyCase]:
    """Every combination, the transfers of one layout together."""
    for layout in LAYOUTS:
        for way in WAYS:
            for place in PLACES:
                for blocks in plan.blocks:
                    yield CopyCase(layout, way, place, blocks)


def block_ids(case: CopyCase, pool_blocks: int, turn: int) -> tuple[tuple[int, ...], ...]:
    """Device blocks and host blocks of a turn; scattered ones are others on either side."""
    if case.place == "adjacent":
        return tuple(range(case.blocks)), tuple(range(case.blocks))
    rng = random.Random(turn)
    pool = range(pool_blocks)
    return tuple(rng.sample(pool, case.blocks)), tuple(rng.sample(pool, case.blocks))


def measure(plan: CopyPlan, device: str = "cuda") -> list[dict[str, Any]]:
    """Every case's figures. Holds some GiB on either side: run it in a process of its own."""
    import torch

    bench = _Bench(plan, torch.device(device))
    try:
        return [figures(case, bench.run(case)) for case in cases(plan)]
    finally:
        bench.close()


def figures(case: CopyCase, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians over turns, and their ratios to the plain copy.

    Args:
        case: what was copied.
        seconds: of each turn, for each of `METHODS`, and of the calls to the engine ("submit").
    """
    size = case.blocks * BLOCK_BYTES
    rates = {method: [size / s / 1e9 for s in seconds[method]] for method in METHODS}
    medians = {method: statistics.median(rates[method]) for method in METHODS}
    return {
        **asdict(case),
        "bytes": size,
        "gb_per_s": medians,
        "gb_per_s_range": {method: (min(r), max(r)) for method, r in rates.items()},
        "over_plain": {method: medians[method] / medians["plain"] for method in METHODS[1:]},
        "submit_ms": 1000 * statistics.median(seconds["submit"]),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a Markdown table."""
    titles = ["layout", "way", "blocks", "MiB", "", "plain GB/s", "engine GB/s", "engine / plain"]
    titles += ["submit ms", "by torch / plain"]
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    for row in rows:
        rates, ratios = row["gb_per_s"], row["over_plain"]
        cells = [row["layout"], row["way"], row["blocks"], row["bytes"] >> 20, row["place"]]
        cells += [f"{rates['plain']:.1f}", f"{rates['engine']:.1f}", f"{ratios['engine']:.3f}"]
        cells += [f"{row['submit_ms']:.2f}", f"{ratios['by_torch']:.3f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


class _Bench:
    """Memory on both sides, and the engines of each layout over it."""

    def __init__(self, plan: CopyPlan, device: Any) -> None:
        import torch

        from fastserve_vllm.kv_swap.host_memory import HostMemory

        self._plan = plan
        self._device = device
        largest, pin = max(plan.blocks) * BLOCK_BYTES, device.type != "cpu"
        self._plain = {
            "device": torch.zeros(largest, dtype=torch.int8, device=device),
            "host": torch.zeros(largest, dtype=torch.int8, pin_memory=pin),
        }
        size = plan.pool_blocks * BLOCK_BYTES
        self._pool = torch.zeros(size, dtype=torch.int8, device=device)
        self._memory = HostMemory(plan.pool_blocks, [LAYOUTS["a row a layer"]], device)
        self._engines = {layout: self._engines_of(layout) for layout in LAYOUTS}

    def run(self, case: CopyCase) -> dict[str, list[float]]:
        """Seconds of each turn."""
        seconds: dict[str, list[float]] = {method: [] for method in (*METHODS, "submit")}
        for turn in range(self._plan.repetitions + 1):
            took = {"plain": self._time_plain(case)}
            took["engine"], took["submit"] = self._time_engine("engine", case, turn)
            took["by_torch"], _ = self._time_engine("by_torch", case, turn)
            if turn:
                for method, took_s in took.items():
                    seconds[method].append(took_s)
        return seconds

    def close(self) -> None:
        """Give the host memory back."""
        for engines in self._engines.values():
            for engine in engines.values():
                engine.close()
        self._engines.clear()
        self._memory.close()

    def _engines_of(self, layout: str) -> dict[str, Any]:
        from fastserve_vllm.kv_swap.copies import BlockRows
        from fastserve_vllm.kv_swap.streams import StreamCopies

        regions, row_bytes = LAYOUTS[layout]
        shape = (regions, self._plan.pool_blocks, row_bytes)
        rows = BlockRows([self._pool.view(shape)], [self._memory.rows[0].view(shape)])
        return {
            "engine": StreamCopies(rows, self._device),
            "by_torch": StreamCopies(rows, self._device, batched=False),
        }

    def _time_plain(self, case: CopyCase) -> float:
        import torch

        source, target = ("device", "host") if case.way == "out" else ("host", "device")
        size = case.blocks * BLOCK_BYTES
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._plain[target][:size].copy_(self._plain[source][:size], non_blocking=True)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _time_engine(self, method: str, case: CopyCase, turn: int) -> tuple[float, float]:
        """Seconds of a transfer, and of the call that started it."""
        from fastserve_vllm.kv_swap.transfers import Direction, Transfer

        engine = self._engines[case.layout][method]
        device_blocks, host_blocks = block_ids(case, self._plan.pool_blocks, turn)
        transfer = Transfer(turn, Direction(case.way), device_blocks, host_blocks)
        began_s = time.perf_counter()
        engine.submit(transfer)
        submit_s = time.perf_counter() - began_s
        engine.wait()
        (finished,) = engine.poll()
        if finished.cause is not None:
            raise RuntimeError(f"a copy {case.way} failed: {finished.cause}")
        return finished.copy_s, submit_s
