"""Gathers the catalogue's figures, a few times a second at most."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastserve_vllm.kv_swap.exchange import KvExchange
from fastserve_vllm.metrics import (
    BY_NAME,
    PHASES,
    PREEMPTIONS,
    Distribution,
)
from fastserve_vllm.policy.job import JobState
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.step_plan import StepPlan
from fastserve_vllm.step_timer import EndedStep

if TYPE_CHECKING:
    from fastserve_vllm.scheduler import FastServeScheduler

_PERIOD_S = 0.2
# The longest wait is looked for among all that wait, thousands perhaps: not so often.
_SLOW_PERIOD_S = 1.0
_DECLINES = ("tokens", "adapters", "memory")


class Reporter:
    """Turns what happened into reports: increases of totals, new observations, current values.

    Args:
        scheduler: what it holds counts what it does. Its planner, demand and exchange exist.
    """

    def __init__(self, scheduler: "FastServeScheduler") -> None:
        self._planner = scheduler.planner
        self._demand = scheduler.demand
        self._blocks = scheduler.kv_cache_manager.block_pool
        self._exchange = scheduler.exchange
        self._batch_limit = scheduler.max_num_active_reqs
        self._clock = scheduler.clock
        self._timer = scheduler.timer
        self._reported: dict[str, Any] = {}
        self._next_s = self._next_slow_s = float("-inf")
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.predicted_step_s = 0.0
        self.tokens = {"prefill": 0, "decode": 0}
        self._waits = [
            _distribution("queue_wait_seconds") for _ in range(self._planner.policy.num_levels)
        ]
        self._steps = _distribution("step_seconds")
        self._ratios = _distribution("prediction_ratio")
        self._sizes = _distribution("batch_requests")

    @property
    def scheduler_s(self) -> float:
        """Seconds spent on FastServe's own scheduling."""
        return sum(self.seconds.values())

    def planned(self, plan: StepPlan, now_s: float) -> None:
        """Note whose wait a plan ends."""
        for job in plan.started:
            self._waits[job.level].observe(now_s - job.waiting_since_s)

    def step(self, step: EndedStep) -> None:
        """Note a step that ended and is learned from."""
        self.predicted_step_s += step.predicted_s
        self.tokens["prefill"] += step.shape.prefill_tokens
        self.tokens["decode"] += step.shape.decodes
        self._steps.observe(step.actual_s)
        self._sizes.observe(step.requests)
        if step.actual_s > 0:
            self._ratios.observe(step.predicted_s / step.actual_s)

    def take(self) -> dict[str, Any] | None:
        """The next report; None if the last one is recent and the engine has not run dry."""
        now_s = self._clock()
        dry = not len(self._planner)
        if now_s < self._next_s and not dry:
            return None
        if dry:
            # Nobody may ask again for long. Otherwise asking would decide when to learn.
            self._timer.learn()
        self._next_s = now_s + _PERIOD_S
        totals = self._totals()
        report = {name: _increase(totals[name], self._reported.get(name)) for name in totals}
        self._reported = totals
        report |= {**self._observations(), **self._gauges()}
        if dry or now_s >= self._next_slow_s:
            self._next_slow_s = now_s + _SLOW_PERIOD_S
            report["longest_wait_seconds"] = self._longest_waits(now_s)
        return report

    def _totals(self) -> dict[str, Any]:
        counters, policy = self._planner.counters, self._planner.policy
        declined = {reason: counters.declined.get(reason, 0) for reason in _DECLINES}
        totals: dict[str, Any] = {
            "started": counters.started,
            "preemptions": {key: counters.preempted.get(key, 0) for key in PREEMPTIONS},
            "joins": _by_level(counters.joined.values()),
            "declined": declined,
            "recomputed_tokens": self._demand.lost_tokens,
            "predicted_step_seconds": self.predicted_step_s,
            "batch_tokens": dict(self.tokens),
            "scheduler_seconds": dict(self.seconds),
        }
        if isinstance(policy, SkipJoinMlfq):
            totals["demotions"] = _by_level(policy.level_demotions)
            totals["promotions"] = policy.promotions
            totals["aged_turns"] = policy.turns
            totals["late_turns"] = policy.late_turns
        if self._exchange is not None:
            declined["host_memory"] = self._exchange.manager.counters.no_room
            totals |= self._swap_totals(self._exchange)
        return totals

    @staticmethod
    def _swap_totals(exchange: KvExchange) -> dict[str, Any]:
        swap = exchange.manager.counters
        return {
            "swapped_out": swap.outs,
            "swapped_in": swap.ins,
            "saved": swap.saves,
            "reused_blocks": {"kept": swap.blocks_kept, "shared": swap.blocks_shared},
            "worker_copies": dict(exchange.copies),
            "copied_bytes": dict(exchange.copied_bytes),
            "copy_seconds": dict(exchange.copy_s),
            "copy_wait_seconds": exchange.waited_s,
            "copies_failed": swap.failed,
        }

    def _observations(self) -> dict[str, Any]:
        waits = [wait.take() for wait in self._waits]
        return {
            "queue_wait_seconds": {str(level): new for level, new in enumerate(waits) if new},
            "step_seconds": self._steps.take(),
            "prediction_ratio": self._ratios.take(),
            "batch_requests": self._sizes.take(),
        }

    def _gauges(self) -> dict[str, Any]:
        planner, policy = self._planner, self._planner.policy
        leaving, free = planner.roster.leaving_blocks, self._blocks.get_num_free_blocks()
        # One block stands for nothing and is never handed out.
        held = self._blocks.num_gpu_blocks - 1 - free - leaving
        gauges: dict[str, Any] = {
            "jobs": {state.value: n for state, n in planner.roster.counts().items()},
            "batch_limit": self._batch_limit,
            "device_blocks": {"free": free, "held": held, "leaving": leaving},
        }
        if isinstance(policy, SkipJoinMlfq):
            gauges["level_jobs"] = _by_level(policy.level_sizes)
            quanta = {str(level): s for level, s in enumerate(policy.ladder.quanta_s)}
            gauges["quantum_seconds"] = {level: s for level, s in quanta.items() if s < math.inf}
            if policy.ageing is not None:
                gauges["starvation_limit_seconds"] = policy.ageing.limit_s
            if policy.gap_s < math.inf:
                gauges["token_gap_limit_seconds"] = policy.gap_s
            if policy.lengths is not None:
                gauges["explained_lengths_ratio"] = policy.lengths.explained
        if planner.ahead is not None:
            gauges["reserve_blocks"] = planner.ahead.reserved_blocks
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
            "in_flight_blocks": manager.in_flight_blocks(),
        }

    def _longest_waits(self, now_s: float) -> dict[str, float]:
        """By level; 0 where nobody waits."""
        since_s = [now_s] * self._planner.policy.num_levels
        idle = (JobState.RUNNING, JobState.BLOCKED)
        for job in self._planner.jobs:
            if job.waiting_since_s < since_s[job.level] and job.state not in idle:
                since_s[job.level] = job.waiting_since_s
        return {str(level): now_s - began_s for level, began_s in enumerate(since_s)}


def _distribution(name: str) -> Distribution:
    return Distribution(BY_NAME[name].buckets)


def _by_level(figures: Iterable[int]) -> dict[str, int]:
    return {str(level): figure for level, figure in enumerate(figures)}


def _increase(total: Any, before: Any) -> Any:
    if isinstance(total, dict):
        before = before or {}
        return {key: value - before.get(key, 0) for key, value in total.items()}
    return total - (before or 0)
