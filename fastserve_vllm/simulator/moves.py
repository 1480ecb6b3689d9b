"""Applies what a plan says of KV cache to the simulated device, host and copies."""

from collections.abc import Callable
from dataclasses import dataclass

from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.step_plan import StepPlan
from fastserve_vllm.simulator.copies import Copy
from fastserve_vllm.simulator.kv_cache import HostState, KvCache, LiveRequest


@dataclass(frozen=True, slots=True)
class KvMoves:
    """Begins the copies of a plan, and follows how they end.

    Attributes:
        planner: told where a job's KV cache is.
        kv: the blocks.
        prefill_s: seconds of computing so many tokens, as far as the scheduler knows.
    """

    planner: StepPlanner
    kv: KvCache
    prefill_s: Callable[[int], float]

    def apply(self, plan: StepPlan, now_s: float) -> float:
        """Move what the plan moves; returns when the step can begin to compute."""
        begun_s = now_s
        for job in plan.spilled:
            begun_s = max(begun_s, self._spill(job, now_s))
        for job in plan.recomputed:
            self._lose(job)
        for job in plan.swapped_out:
            self._send_out(job, now_s)
        for job in plan.swapped_in:
            blocks = self.kv.come_back(job.handle)
            self.kv.channels.begin(Copy(job, blocks), "in", now_s)
        for job in plan.saved:
            self.kv.save(job, now_s)
        for job in plan.started:
            begun_s = max(begun_s, self._start(job, now_s))
        return begun_s

    def land(self, now_s: float) -> None:
        """Copies have ended."""
        if not len(self.kv.channels):
            return
        for copy in self.kv.channels.ended(now_s):
            job = copy.job
            if job is None:
                continue
            live: LiveRequest = job.handle
            if job.state is JobState.SWAPPING_OUT:
                self._sent_out(job)
            elif job.state is JobState.SWAPPING_IN:
                self.kv.retain(live)
                job.next_tokens = live.num_tokens - live.computed
                job.swapped_tokens = 0
                self.planner.swapped_in(job)
            elif live.host is HostState.SAVING:
                self.kv.retain(live)

    def _start(self, job: Job, now_s: float) -> float:
        """Give a job what the device or the host has of it; returns when that is there."""
        live: LiveRequest = job.handle
        if not live.blocks and not job.swapped_tokens and self.kv.find(live):
            job.next_tokens = live.num_tokens - live.computed
        if not job.swapped_tokens:
            return now_s
        blocks = self.kv.come_back(live)
        self.kv.retain(live)
        job.swapped_tokens = 0
        return self.kv.channels.wait(blocks, "in", now_s)

    def _start_over(self, job: Job) -> None:
        """A job that lost its device blocks computes all tokens again that the host lacks."""
        live: LiveRequest = job.handle
        kept = min(live.host_tokens, live.num_tokens - 1)
        job.swapped_tokens = kept if live.host is HostState.SWAPPED else 0
        job.next_tokens = live.num_tokens - job.swapped_tokens
        job.first_step_s = self.prefill_s(job.next_tokens)

    def _lose(self, job: Job) -> None:
        """The KV cache is gone; a copy that the host keeps is of use only if it was swapped."""
        self.kv.release(job.handle)
        self._start_over(job)

    def _spill(self, job: Job, now_s: float) -> float:
        """Free the blocks at once: the step waits for the copy. Returns when that ends."""
        live: LiveRequest = job.handle
        missing = self.kv.leave(live)
        if missing is None:
            self._lose(job)
            self.planner.evict(job, now_s)
            return now_s
        end_s = self.kv.channels.wait(missing, "out", now_s)
        self.kv.release(live)
        live.host = HostState.SWAPPED
        self._start_over(job)
        return end_s

    def _send_out(self, job: Job, now_s: float) -> None:
        missing = self.kv.leave(job.handle)
        if missing is None:
            self.planner.stayed(job)
        elif missing:
            self.kv.channels.begin(Copy(job, missing), "out", now_s)
        else:
            self._sent_out(job)

    def _sent_out(self, job: Job) -> None:
        self.kv.release(job.handle)
        job.handle.host = HostState.SWAPPED
        self.planner.swapped_out(job)
        self._start_over(job)
