"""A discrete-event engine: the live scheduler's planner and policy on simulated steps and copies.

Between two events (an arrival, a finish, a demotion, a promotion, the end of a copy, a prefill) the
same jobs decode in step after step. Such steps are taken in one *leap*, so that the cost of a
simulation follows the events and not the tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.budget import StepLimits, token_budget
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.make import base_quantum_s, make_policy, rebase
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.step_plan import StepPlan
from fastserve_vllm.policy.step_time import StepShape, StepTimeModel, load_profile
from fastserve_vllm.simulator.copies import Copy, CopyChannels
from fastserve_vllm.simulator.free_blocks import FreeBlocks
from fastserve_vllm.simulator.kv_cache import HostState, KvCache, LiveRequest
from fastserve_vllm.simulator.served import ServedRequest
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.traces import Request


class SimulatedEngine:
    """Serves requests in simulated time.

    Args:
        shape: the engine.
        config: FastServe's configuration, as for the live scheduler.
        policy: a policy of the caller's own, which is asked for nothing that `config` names.
        on_gap: told of each gap between two tokens of a request: its seconds, and how many
            gaps were alike.
        leap: take steps that nothing happens between at once. Off, the simulation is slower and
            its decisions are the same.
    """

    def __init__(
        self,
        shape: EngineShape,
        config: FastServeConfig,
        *,
        policy: Policy | None = None,
        on_gap: Callable[[float, int], None] | None = None,
        leap: bool = True,
    ) -> None:
        self.shape = shape
        self.config = config
        self.now_s = 0.0
        self.steps = 0
        self.stepping_s = 0.0
        self.copy_wait_s = 0.0
        self.prefill_tokens = 0
        self._on_gap = on_gap or _ignore
        self._leap = leap
        profile = config.step_time_profile
        self._learned = StepTimeModel() if profile is None else load_profile(profile)
        self.kv = KvCache(
            device=FreeBlocks(shape.device_blocks),
            block_tokens=shape.block_tokens,
            host_blocks=shape.host_blocks,
            channels=CopyChannels(shape.block_copy_s),
            step_time=self._learned,
        )
        base_s = base_quantum_s(config, self._learned, shape.batch_limit)
        self.policy = policy or make_policy(config, base_s, shape.batch_limit)
        self._rebases = policy is None
        swaps = config.swap_mode != "recompute"
        ahead = config.swap_mode == "proactive"
        self.planner = StepPlanner(
            self.policy,
            self.kv,
            self.kv if swaps else None,
            shape.device_blocks if ahead else None,
        )
        self._ended_s = -1.0
        self._uncharged_s = 0.0
        self._uncharged_steps = 0

    def serve(self, requests: Iterable[Request]) -> Iterator[ServedRequest]:
        """Serve the requests, which come in order of arrival; yields each one as it finishes.

        Raises:
            ValueError: a request can never fit on the device, or arrives before its predecessor.
            RuntimeError: the engine can make no progress.
        """
        arrivals = iter(requests)
        coming = next(arrivals, None)
        while coming is not None or len(self.planner):
            if coming is not None and not len(self.planner):
                self.now_s = max(self.now_s, coming.arrival_s)
            while coming is not None and coming.arrival_s <= self.now_s:
                self._arrive(coming)
                follower = next(arrivals, None)
                if follower is not None and follower.arrival_s < coming.arrival_s:
                    raise ValueError(f"request {follower.id} arrives out of order")
                coming = follower
            yield from self._step(math.inf if coming is None else coming.arrival_s)

    def check_integrity(self) -> None:
        """Laws I1 and I4.

        Raises:
            AssertionError: naming the law.
        """
        self.planner.check_integrity()
        live = [job.handle for job in self.planner.jobs]
        self.kv.check_integrity(live, self.shape.device_blocks)

    # ---- life of a request --------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        blocks = self.kv.blocks_of(request.prompt_tokens + request.output_tokens)
        if blocks > self.shape.device_blocks:
            raise ValueError(
                f"request {request.id} needs {blocks} KV blocks, the device has "
                f"{self.shape.device_blocks}"
            )
        job = Job(
            request.id,
            request.prompt_tokens,
            first_step_s=self._prefill_s(request.prompt_tokens),
            handle=LiveRequest(request),
        )
        job.next_tokens = request.prompt_tokens
        self.planner.add(job, self.now_s)

    def _prefill_s(self, tokens: int) -> float:
        return self._learned.prefill_s(tokens, self.shape.token_budget)

    def _start_over(self, job: Job) -> None:
        """A job that lost its device blocks computes all tokens again that the host lacks."""
        live: LiveRequest = job.handle
        kept = min(live.host_tokens, live.num_tokens - 1)
        job.swapped_tokens = kept if live.host is HostState.SWAPPED else 0
        job.next_tokens = live.num_tokens - job.swapped_tokens
        job.first_step_s = self._prefill_s(job.next_tokens)

    # ---- one step, or one leap ----------------------------------------------------------------

    def _step(self, arrival_s: float) -> list[ServedRequest]:
        if self._rebases:
            batch_limit = self.shape.batch_limit
            rebase(self.policy, self.config, self._learned, batch_limit, self.planner.running)
        self.planner.observe(self._uncharged_s, self.now_s, self._uncharged_steps)
        self._uncharged_s, self._uncharged_steps = 0.0, 0
        limits = StepLimits(
            batch_limit=self.shape.batch_limit,
            token_budget=self._token_budget(),
            free_blocks=self.kv.device.count,
            block_tokens=self.shape.block_tokens,
        )
        plan = self.planner.plan(limits, self.now_s)
        begun_s = self._move(plan)
        if plan.batch:
            return self._compute(plan, begun_s, arrival_s)
        self._idle(arrival_s)
        return []

    def _token_budget(self) -> int:
        shape = self.shape
        return token_budget(self._learned, self.policy.gap_s, shape.token_budget, shape.batch_limit)

    def _idle(self, arrival_s: float) -> None:
        """Nobody can run before a copy ends or somebody arrives."""
        ends_s = self.kv.channels.next_end_s if len(self.kv.channels) else math.inf
        moment_s = min(ends_s, arrival_s)
        if not math.isfinite(moment_s):
            raise RuntimeError("no job can run, and nothing is going to happen")
        self.now_s = max(self.now_s, moment_s)
        self._land()

    def _compute(self, plan: StepPlan, begun_s: float, arrival_s: float) -> list[ServedRequest]:
        plan, counts = self._token_counts(plan)
        prefill, context = 0, 0
        for job, tokens in zip(plan.batch, counts, strict=True):
            context += job.handle.computed
            if tokens > 1:
                prefill += tokens
        decodes = counts.count(1)
        shape = StepShape(prefill, decodes, context)
        first_s = self.shape.step_time.predict_s(shape)
        growth_s = 0.0
        steps = 1
        if self._leap and not prefill and begun_s == self.now_s:
            grown = StepShape(0, decodes, context + decodes)
            growth_s = self.shape.step_time.predict_s(grown) - first_s
            steps = self._quiet_steps(plan, first_s, growth_s, arrival_s)
        wait_s = begun_s - self.now_s
        total_s = steps * first_s + growth_s * (steps * (steps - 1) // 2)
        self.copy_wait_s += wait_s
        first_end_s = begun_s + first_s
        last_step_s = first_s + (steps - 1) * growth_s
        self._learned.observe(shape, wait_s + first_s)
        self.now_s = begun_s + total_s
        self.steps += steps
        self.prefill_tokens += prefill
        self.stepping_s += wait_s + total_s
        self._uncharged_s += wait_s + total_s
        self._uncharged_steps += steps
        if steps > 1:
            # Those of the second step to the last.
            self._on_gap(first_s + steps * growth_s / 2, (steps - 1) * decodes)
        finished = self._advance(plan, counts, steps, first_end_s, last_step_s)
        self._land()
        return finished

    def _token_counts(self, plan: StepPlan) -> tuple[StepPlan, list[int]]:
        """Tokens that each job of the batch computes; residents are served first, as by vLLM.

        So a prefill that gets the rest may leave none to one that came back from the host.
        """
        batch = plan.batch
        if all(job.next_tokens == 1 for job in batch):
            return plan, [1] * len(batch)
        left = self._token_budget()
        counts = dict.fromkeys(batch, 0)
        for entering in (False, True):
            for job in batch:
                if job.handle.entered is not entering:
                    counts[job] = min(job.next_tokens, left)
                    left -= counts[job]
        for job in [job for job in batch if not counts[job]]:
            if not job.handle.blocks:
                raise RuntimeError("a plan needs more tokens than the step has")
            self.planner.missed(job, self.now_s)
            del counts[job]
        return plan._replace(batch=tuple(counts)), list(counts.values())

    def _advance(
        self,
        plan: StepPlan,
        counts: Sequence[int],
        steps: int,
        first_end_s: float,
        last_step_s: float,
    ) -> list[ServedRequest]:
        """The batch has computed: allocate, count tokens and gaps, and finish who is done."""
        finished = []
        kv, block_tokens, now_s = self.kv, self.shape.block_tokens, self.now_s
        # Those who ran in the step before have the same gap.
        before_s, self._ended_s = self._ended_s, now_s
        unbroken = 0
        for job, tokens in zip(plan.batch, counts, strict=True):
            live: LiveRequest = job.handle
            live.entered = True
            live.computed += tokens + steps - 1
            if live.computed > live.blocks * block_tokens:
                kv.grow(live, live.computed)
            if tokens < job.next_tokens:
                job.next_tokens -= tokens
                continue
            job.next_tokens = 1
            live.generated += steps
            if live.generated > steps or live.first_token_s >= 0.0:
                gap_s = first_end_s - live.last_token_s
                if live.last_token_s == before_s:
                    unbroken += 1
                else:
                    self._on_gap(gap_s, 1)
                if gap_s > live.longest_gap_s or last_step_s > live.longest_gap_s:
                    live.longest_gap_s = max(gap_s, last_step_s)
            else:
                live.first_token_s = first_end_s
                if steps > 1:
                    live.longest_gap_s = last_step_s
            live.last_token_s = now_s
            if live.generated >= live.request.output_tokens:
                finished.append(self._finish(job))
        if unbroken:
            self._on_gap(first_end_s - before_s, unbroken)
        return finished

    def _finish(self, job: Job) -> ServedRequest:
        live: LiveRequest = job.handle
        self.planner.remove(job)
        self.kv.forget(live)
        return ServedRequest(
            live.request, live.first_token_s, live.last_token_s, live.longest_gap_s
        )

    # ---- leaps --------------------------------------------------------------------------------

    def _quiet_steps(
        self, plan: StepPlan, first_s: float, growth_s: float, arrival_s: float
    ) -> int:
        """Steps until something happens, at least 1: the batch decodes on alike in all of them."""
        reserved = self.planner.quiet_blocks
        if len(self.kv.channels) or reserved is None:
            return 1
        steps = min(job.handle.request.output_tokens - job.handle.generated for job in plan.batch)
        calm_s = min(arrival_s - self.now_s, self.policy.calm_s(self.now_s))
        if calm_s <= first_s:
            return 1
        if steps > 1 and math.isfinite(calm_s):
            steps = min(steps, _steps_of(calm_s, first_s, growth_s))
        # Growth is a block in `block_tokens` steps for each job; short of memory, step by step.
        spare = self.kv.device.count - reserved - 2 * len(plan.batch)
        grows = spare // len(plan.batch) * self.shape.block_tokens
        return int(max(min(steps, grows), 1))

    # ---- KV cache that moves ------------------------------------------------------------------

    def _move(self, plan: StepPlan) -> float:
        """Apply what the plan says of KV cache; when the step can begin to compute."""
        begun_s = self.now_s
        for job in plan.spilled:
            begun_s = max(begun_s, self._spill(job))
        for job in plan.recomputed:
            self._lose(job)
        for job in plan.swapped_out:
            self._send_out(job)
        for job in plan.swapped_in:
            self._bring_in(job)
        for job in plan.saved:
            self.kv.save(job, self.now_s)
        for job in plan.started:
            live: LiveRequest = job.handle
            if live.freed is not None and not live.blocks and not job.swapped_tokens:
                self.kv.adopt(live)
                job.next_tokens = live.num_tokens - live.computed
            if job.swapped_tokens:
                blocks = self.kv.come_back(job.handle)
                self.kv.retain(job.handle)
                job.swapped_tokens = 0
                begun_s = max(begun_s, self.kv.channels.wait(blocks, "in", self.now_s))
        return begun_s

    def _lose(self, job: Job) -> None:
        """The KV cache is gone; a copy that the host keeps is of use only if it was swapped."""
        self.kv.release(job.handle)
        self._start_over(job)

    def _spill(self, job: Job) -> float:
        """Free the blocks at once: the step waits for the copy. Returns when that ends."""
        live: LiveRequest = job.handle
        missing = self.kv.leave(live)
        if missing is None:
            self._lose(job)
            self.planner.evict(job, self.now_s)
            return self.now_s
        end_s = self.kv.channels.wait(missing, "out", self.now_s)
        self.kv.release(live)
        live.host = HostState.SWAPPED
        self._start_over(job)
        return end_s

    def _send_out(self, job: Job) -> None:
        missing = self.kv.leave(job.handle)
        if missing is None:
            self.planner.stayed(job)
        elif missing:
            self.kv.channels.begin(Copy(job, missing), "out", self.now_s)
        else:
            self._sent_out(job)

    def _sent_out(self, job: Job) -> None:
        self.kv.release(job.handle)
        job.handle.host = HostState.SWAPPED
        self.planner.swapped_out(job)
        self._start_over(job)

    def _bring_in(self, job: Job) -> None:
        blocks = self.kv.come_back(job.handle)
        self.kv.channels.begin(Copy(job, blocks), "in", self.now_s)

    def _land(self) -> None:
        """Copies have ended."""
        if not len(self.kv.channels):
            return
        for copy in self.kv.channels.ended(self.now_s):
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


def _ignore(gap_s: float, times: int) -> None:
    """Nobody wants to know."""


def _steps_of(seconds: float, first_s: float, growth_s: float) -> int:
    """The fewest steps that take at least `seconds`, where each is `growth_s` longer."""
    if growth_s > 0:
        half = first_s - growth_s / 2
        steps = (math.sqrt(half * half + 2 * growth_s * seconds) - half) / growth_s
    else:
        steps = seconds / first_s
    return max(math.ceil(steps - 1e-9), 1)
