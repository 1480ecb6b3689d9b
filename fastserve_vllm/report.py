"""Gathers the catalogue's figures, a few times a second at most."""

import time
from typing import Any

from fastserve_vllm.kv_swap.exchange import KvExchange
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.step_timer import StepTimer

_PERIOD_S = 0.2


class Reporter:
    """Turns running totals into reports: increments for counters, values for gauges."""

    def __init__(self, planner: StepPlanner, timer: StepTimer, exchange: KvExchange | None) -> None:
        self._planner = planner
        self._timer = timer
        self._exchange = exchange
        self._reported: dict[str, Any] = {}
        self._next_s = 0.0
        self.scheduler_s = 0.0

    def take(self) -> dict[str, Any] | None:
        """The next report; None if the last one is recent and the engine has not run dry."""
        now_s = time.monotonic()
        if now_s < self._next_s and len(self._planner):
            return None
        self._next_s = now_s + _PERIOD_S
        totals = self._totals()
        report = {name: _increase(totals[name], self._reported.get(name)) for name in totals}
        self._reported = totals
        return {**report, **self._gauges()}

    def _totals(self) -> dict[str, Any]:
        counters, policy = self._planner.counters, self._planner.policy
        totals: dict[str, Any] = {
            "started": counters.started,
            "paused": counters.paused,
            "recomputed": counters.recomputed,
            "spilled": counters.spilled,
            "swapped_out": counters.swapped_out,
            "swapped_in": counters.swapped_in,
            "saved": counters.saved,
            "declined": dict(counters.declined),
            "steps": self._timer.steps,
            "step_seconds": self._timer.step_s,
            "predicted_step_seconds": self._timer.predicted_step_s,
            "scheduler_seconds": self.scheduler_s,
        }
        if isinstance(policy, SkipJoinMlfq):
            totals["demotions"] = policy.demotions
            totals["promotions"] = policy.promotions
            totals["skip_joins"] = policy.skip_joins
        if self._exchange is not None:
            totals["copied_bytes"] = dict(self._exchange.copied_bytes)
            totals["copy_wait_seconds"] = self._exchange.waited_s
            totals["copies_failed"] = self._exchange.manager.counters.failed
        return totals

    def _gauges(self) -> dict[str, Any]:
        counts = self._planner.state_counts()
        gauges: dict[str, Any] = {"jobs": {state.value: n for state, n in counts.items()}}
        policy = self._planner.policy
        if isinstance(policy, SkipJoinMlfq):
            gauges["level_jobs"] = {str(i): n for i, n in enumerate(policy.level_sizes)}
            gauges["base_quantum_seconds"] = policy.ladder.base_s
        if self._exchange is not None:
            gauges |= self._host_gauges(self._exchange)
        return gauges

    @staticmethod
    def _host_gauges(exchange: KvExchange) -> dict[str, Any]:
        manager = exchange.manager
        free, reclaimable = manager.free_blocks, manager.reclaimable_blocks
        held = manager.host_blocks - free - reclaimable
        return {
            "copy_bytes_per_second": exchange.bandwidth.bytes_per_s,
            "host_blocks": {"free": free, "reclaimable": reclaimable, "held": held},
        }


def _increase(total: Any, before: Any) -> Any:
    if isinstance(total, dict):
        before = before or {}
        return {key: value - before.get(key, 0) for key, value in total.items()}
    return total - (before or 0)
