"""Stock vLLM's scheduler in virtual time. Importing this module imports vLLM."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler

from benchmarks.virtual_clock import VirtualTime


class StockVirtual(VirtualTime, Scheduler):
    """vLLM's own scheduler, unchanged but for the clock."""
