"""FastServe's scheduler in virtual time. Importing this module imports vLLM and FastServe."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from benchmarks.virtual_clock import VirtualTime, current_clock
from fastserve_vllm.scheduler import FastServeScheduler


class FastServeVirtual(VirtualTime, FastServeScheduler):
    """FastServe's scheduler, reading the virtual clock instead of the wall's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, clock=current_clock(), **kwargs)

    def benchmark_counters(self) -> dict[str, Any]:
        """What FastServe counted, for the result; `recomputed` are its preemptions."""
        counters = asdict(self.planner.counters)
        for name in ("demotions", "promotions", "skip_joins"):
            if hasattr(self.planner.policy, name):
                counters[name] = getattr(self.planner.policy, name)
        return counters
