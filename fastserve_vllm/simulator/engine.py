"""A discrete-event engine: the live scheduler's planner and policy on simulated steps and copies.

Between two events (an arrival, a finish, a demotion, a promotion, the end of a copy, a prefill) the
same jobs decode in step after step. Such steps are taken in one *leap*, so that the cost of a
simulation follows the events and not the tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.budget import StepLimits, token_budget
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.make import base_quantum_s, make_policy, rebase
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.step_plan import StepPlan
from fastserve_vllm.policy.step_time import StepShape, StepTimeModel, load_profile
from fastserve_vllm.simulator.copies import CopyChannels
from fastserve_vllm.simulator.free_blocks import FreeBlocks
from fastserve_vllm.simulator.kv_cache import KvCache, LiveRequest
from fastserve_vllm.simulator.moves import KvMoves
from fastserve_vllm.simulator.served import ServedRequest
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.simulator.stretch import Stretch
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
        # The revision of the step times that the ladder and the token budget follow.
        self._followed = -1
        self._token_budget = shape.token_budget
        self.moves = KvMoves(self.planner, self.kv, self._prefill_s)
        # When what was begun ends.
        self.ends_s = 0.0
        self._stretch: Stretch | None = None
        # No token's time, so that nobody seems to have run before the first step.
        self._ended_s = -2.0
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
                self.arrive(coming)
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

    def arrive(self, request: Request) -> None:
        """A request is there when the next step is planned.

        Raises:
            ValueError: it can never fit on the device.
        """
        blocks = self.kv.blocks_of(request.prompt_tokens + request.output_tokens)
        if blocks > self.shape.device_blocks:
            raise ValueError(
                f"request {request.id} needs {blocks} KV blocks, the device has "
                f"{self.shape.device_blocks}"
            )
        job = Job(
            request.id,
            request.prompt_tokens,
            first_step_s=self._prefill_s(request.prompt_tokens - self.kv.cached_tokens(request)),
            handle=LiveRequest(request),
        )
        job.next_tokens = request.prompt_tokens
        self.planner.add(job, self.now_s)

    def _prefill_s(self, tokens: int) -> float:
        return self._learned.prefill_s(tokens, self.shape.token_budget)

    # ---- one step, or one leap ----------------------------------------------------------------

    def begin(self) -> None:
        """Plan the next step, and those that are going to be like it: they last until `ends_s`."""
        batch_limit = self.shape.batch_limit
        if self._learned.revision != self._followed:
            self._follow_step_times()
        self.planner.observe(self._uncharged_s, self.now_s, self._uncharged_steps)
        self._uncharged_s, self._uncharged_steps = 0.0, 0
        limits = StepLimits(
            batch_limit=batch_limit,
            token_budget=self._token_budget,
            free_blocks=self.kv.device.count,
            block_tokens=self.shape.block_tokens,
        )
        plan = self.planner.plan(limits, self.now_s)
        begun_s = self.moves.apply(plan, self.now_s)
        if plan.batch:
            self._stretch = self._compute(plan, begun_s)
            self.ends_s = self._stretch.ends_s
        else:
            # Nobody can run before a copy ends or somebody arrives.
            self._stretch = None
            channels = self.kv.channels
            self.ends_s = channels.next_end_s if len(channels) else math.inf

    def cut(self, arrival_s: float) -> None:
        """A request arrives: what was begun goes on to the end of the step in which it comes."""
        if self._stretch is None:
            self.ends_s = min(self.ends_s, arrival_s)
        elif self._stretch.cut(arrival_s):
            self.ends_s = self._stretch.ends_s

    def finish(self) -> list[ServedRequest]:
        """What was begun ends, at `ends_s`; returns the requests that are done.

        Raises:
            RuntimeError: nobody can run, and nothing is going to happen.
        """
        stretch = self._stretch
        finished: list[ServedRequest] = []
        if stretch is not None:
            self._account(stretch)
            finished = self._advance(stretch)
        elif math.isfinite(self.ends_s):
            self.now_s = max(self.now_s, self.ends_s)
        else:
            raise RuntimeError("no job can run, and nothing is going to happen")
        self.moves.land(self.now_s)
        return finished

    def _step(self, arrival_s: float) -> list[ServedRequest]:
        self.begin()
        self.cut(arrival_s)
        return self.finish()

    def _follow_step_times(self) -> None:
        """Fit the ladder to what steps take, and the steps to the gap bound."""
        most, batch_limit, learned = self.shape.token_budget, self.shape.batch_limit, self._learned
        if self._rebases:
            rebase(self.policy, self.config, learned, batch_limit, self.planner.running)
        self._token_budget = token_budget(learned, self.policy.gap_s, most, batch_limit)
        self._followed = learned.revision

    def _compute(self, plan: StepPlan, begun_s: float) -> Stretch:
        """What the batch is going to do, and for how long."""
        batch, counts = self._token_counts(plan.batch)
        prefill, context = 0, 0
        for job, tokens in zip(batch, counts, strict=True):
            context += job.handle.computed
            if tokens > 1:
                prefill += tokens
        shape = StepShape(prefill, counts.count(1), context)
        first_s = self.shape.step_time.predict_s(shape)
        stretch = Stretch(batch, counts, shape, begun_s - self.now_s, begun_s, first_s)
        if self._leap and not prefill and begun_s == self.now_s:
            grown = StepShape(0, shape.decodes, context + shape.decodes)
            stretch.growth_s = self.shape.step_time.predict_s(grown) - first_s
            stretch.steps = self._quiet_steps(stretch)
        return stretch

    def _token_counts(self, batch: tuple[Job, ...]) -> tuple[tuple[Job, ...], list[int]]:
        """Tokens that each job of the batch computes; residents are served first, as by vLLM.

        So a prefill that gets the rest may leave none to one that came back from the host.
        """
        if all(job.next_tokens == 1 for job in batch):
            return batch, [1] * len(batch)
        left = self._token_budget
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
        return tuple(counts), list(counts.values())

    def _account(self, stretch: Stretch) -> None:
        """The batch has computed: time, and what is learned of it."""
        seconds = stretch.wait_s + stretch.total_s
        self._learned.observe(stretch.shape, stretch.wait_s + stretch.first_s)
        self.now_s = stretch.ends_s
        self.steps += stretch.steps
        self.prefill_tokens += stretch.shape.prefill_tokens
        self.copy_wait_s += stretch.wait_s
        self.stepping_s += seconds
        self._uncharged_s += seconds
        self._uncharged_steps += stretch.steps
        if stretch.steps > 1:
            # Those of the second step to the last.
            mean_s = stretch.first_s + stretch.steps * stretch.growth_s / 2
            self._on_gap(mean_s, (stretch.steps - 1) * stretch.shape.decodes)

    def _advance(self, stretch: Stretch) -> list[ServedRequest]:
        """The batch has computed: allocate, count tokens and gaps, and finish who is done."""
        finished = []
        kv, block_tokens, now_s = self.kv, self.shape.block_tokens, self.now_s
        steps = stretch.steps
        first_end_s = stretch.begun_s + stretch.first_s
        last_step_s = stretch.first_s + (steps - 1) * stretch.growth_s
        # Those who ran in the step before have the same gap.
        before_s, self._ended_s = self._ended_s, now_s
        unbroken, unbroken_s = 0, max(first_end_s - before_s, last_step_s)
        for job, tokens in zip(stretch.batch, stretch.counts, strict=True):
            live: LiveRequest = job.handle
            live.entered = True
            live.computed = computed = live.computed + tokens + steps - 1
            if computed > live.blocks * block_tokens:
                kv.grow(live, computed)
            if tokens != job.next_tokens:
                job.next_tokens -= tokens
                continue
            job.next_tokens = 1
            live.generated = generated = live.generated + steps
            last_s, live.last_token_s = live.last_token_s, now_s
            if last_s == before_s:
                unbroken += 1
                longest_s = unbroken_s
            elif last_s >= 0.0:
                self._on_gap(first_end_s - last_s, 1)
                longest_s = max(first_end_s - last_s, last_step_s)
            else:
                live.first_token_s = first_end_s
                kv.remember(live)
                longest_s = last_step_s if steps > 1 else 0.0
            if longest_s > live.longest_gap_s:  # noqa: PLR1730 - a call costs more
                live.longest_gap_s = longest_s
            if generated >= live.request.output_tokens:
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

    def _quiet_steps(self, stretch: Stretch) -> int:
        """Steps until something happens, at least 1, if nobody arrives before."""
        reserved = self.planner.quiet_blocks
        if len(self.kv.channels) or reserved is None:
            return 1
        batch = stretch.batch
        live = [job.handle for job in batch]
        steps = min([one.request.output_tokens - one.generated for one in live])
        if steps > 1:
            steps = min(steps, stretch.steps_within(self.policy.calm_s(self.now_s)))
        # Growth is a block in `block_tokens` steps for each job; short of memory, step by step.
        spare = self.kv.device.count - reserved - 2 * len(batch)
        grows = spare // len(batch) * self.shape.block_tokens
        return int(max(min(steps, grows), 1))


def _ignore(gap_s: float, times: int) -> None:
    """Nobody wants to know."""
