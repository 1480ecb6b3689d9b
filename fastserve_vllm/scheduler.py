"""vLLM's scheduler, with each step's batch chosen by FastServe: observe, plan, apply, delegate."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from fastserve_vllm import host
from fastserve_vllm.config import ConfigError, FastServeConfig, check_period_steps
from fastserve_vllm.demand import HostDemand
from fastserve_vllm.kv_swap.connector import find_connector
from fastserve_vllm.kv_swap.exchange import KvExchange
from fastserve_vllm.kv_swap.worker import refuse_unsupported
from fastserve_vllm.planned_queue import PlannedQueue
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.make import base_quantum_s, make_policy, rebase
from fastserve_vllm.policy.step_plan import StepPlan
from fastserve_vllm.report import Reporter
from fastserve_vllm.standing_plan import StandingPlan
from fastserve_vllm.start_line import describe, warn_of_slots
from fastserve_vllm.step_timer import StepTimer
from fastserve_vllm.swap_moves import SwapMoves
from fastserve_vllm.tracing import close_trace, make_planner

logger = init_logger(__name__)


class FastServeScheduler(AsyncScheduler):
    """Preempts at every step: the batch is always the first jobs of the policy's total order.

    vLLM walks `running` in list order, then its waiting queues. Between steps `running` holds the
    last batch and `left_out` the requests that were preempted and keep their KV cache; the
    waiting queues hold everybody else and show vLLM only whom the plan lets in. vLLM's own
    `schedule()` then does all that it does in stock operation.

    Args:
        clock: seconds, monotonic; the only time the scheduler knows.
        args, kwargs: as for vLLM's scheduler.

    Raises:
        HostContractError: the installed vLLM does not fit.
        ConfigError: FastServe's connector is missing, its configuration is not valid, or the model
            cannot be scheduled by it.
    """

    def __init__(
        self, *args: Any, clock: Callable[[], float] = time.monotonic, **kwargs: Any
    ) -> None:
        host.check()
        super().__init__(*args, **kwargs)
        if self.vllm_config.diffusion_config is not None:
            raise ConfigError(
                "diffusion models are scheduled by a scheduler of vLLM's own: start this one "
                "without --scheduler fastserve"
            )
        if not self.scheduler_config.async_scheduling:
            self._be_synchronous()
        connector = find_connector(self.connector)
        if connector is None:
            raise ConfigError(
                "FastServe's connector is not configured: select the scheduler with "
                "--scheduler fastserve, fastserve_vllm.LLM or fastserve_vllm.select(), and name "
                "other KV connectors with --kv-transfer-config (--kv-offloading-size replaces it)"
            )
        self.fastserve_config: FastServeConfig = connector.config
        host.check_executor(self.vllm_config, swaps=connector.config.swap_mode != "recompute")
        self.clock = clock
        self.waiting = PlannedQueue()
        self.kv_holding_waiting = PlannedQueue()
        self.left_out: dict[Request, None] = {}
        engine = self.vllm_config.parallel_config.data_parallel_index
        self.timer = StepTimer(self.fastserve_config, engine)
        self.step_time = self.timer.step_time
        self.demand = HostDemand(self)
        config, batch_limit = self.fastserve_config, self.max_num_active_reqs
        base_s = base_quantum_s(config, self.step_time, batch_limit)
        policy = make_policy(config, base_s, batch_limit)
        self.exchange: KvExchange | None = None
        if self.fastserve_config.swap_mode != "recompute":
            refuse_unsupported(self.kv_cache_config)
            self.exchange = KvExchange(self, self.fastserve_config, self.step_time)
        connector.exchange = self.exchange
        ahead = self.fastserve_config.swap_mode == "proactive"
        blocks = self.kv_cache_config.num_blocks if ahead else None
        self.planner = make_planner(self, policy, blocks)
        self._jobs: dict[str, Job] = {}
        self._blocked: dict[Job, None] = {}
        self._resetting = False
        # Whether vLLM let a job of the last plan not start, for want of memory that others reserve.
        self.start_refused = False
        self.moves = SwapMoves(self, self._jobs)
        # The revision of the step times that the ladder and the token budget follow.
        self._followed = -1
        self._check_every = check_period_steps()
        self._standing = StandingPlan(self)
        self.reporter = Reporter(self)
        self.timer.note = self.reporter.step
        connector.statistics = self.reporter.take
        logger.info("FastServe: %s", describe(self))
        warn_of_slots(self, logger)

    # ---- one step -------------------------------------------------------------------------

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan a step, show vLLM only the plan, and let it schedule."""
        now_s = self.clock()
        plan = None
        if self._pause_state is not PauseState.PAUSED_ALL:
            plan = self._plan(now_s)
        output = super().schedule(throttle_prefills)
        delegated = time.perf_counter()
        if plan is not None:
            self._reconcile(plan, output, now_s)
        if self._check_every and self.current_step % self._check_every == 0:
            self.check_integrity()
        self.timer.scheduled(now_s)
        self.moves.history.step_scheduled()
        self.reporter.seconds["follow"] += time.perf_counter() - delegated
        return output

    def _plan(self, now_s: float) -> StepPlan:
        """Choose the step's batch and show it to vLLM; note how long that takes."""
        entered = time.perf_counter()
        standing = self._standing.again()
        if standing is not None:
            self.reporter.seconds["plan"] += time.perf_counter() - entered
            return standing
        self._observe(now_s)
        observed = time.perf_counter()
        limits = self.demand.limits()
        plan = self.planner.plan(limits, now_s)
        if plan.started:
            self.reporter.planned(plan, now_s)
        planned = time.perf_counter()
        self._apply(plan)
        self._standing.made(plan, limits, now_s)
        seconds = self.reporter.seconds
        seconds["observe"] += observed - entered
        seconds["plan"] += planned - observed
        seconds["apply"] += time.perf_counter() - planned
        return plan

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Measure the step that ended, then let vLLM take in its output."""
        entered = time.perf_counter()
        self.timer.ended(scheduler_output, self.clock())
        self.reporter.seconds["measure"] += time.perf_counter() - entered
        transfers = model_runner_output.kv_connector_output
        self.moves.take_back(transfers)
        if transfers is not None and transfers.invalid_block_ids:
            spoiled = self.moves.spoiled(transfers.invalid_block_ids)
            with self._all_residents():
                outputs = super().update_from_output(scheduler_output, model_runner_output)
            self.moves.recover(spoiled)
        else:
            outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.exchange is not None and self.exchange.has_news:
            entered = time.perf_counter()
            self.moves.follow(self.exchange)
            self.reporter.seconds["copies"] += time.perf_counter() - entered
        # A server is often killed before it shuts its scheduler down, so an idle one saves, too.
        if not len(self.planner):
            self.timer.learn()
            self.timer.save_at_times(self.clock())
        return outputs

    def _observe(self, now_s: float) -> None:
        """Charge what ran, demote, promote; let in whoever stopped being blocked."""
        planner = self.planner
        if self.step_time.revision != self._followed:
            self._follow_step_times()
        planner.observe(self.timer.take_s(), now_s, self._standing.steps)
        for job in list(self._blocked):
            if self._handle_blocked_waiting_request(job.handle):
                del self._blocked[job]
                self.demand.size_up(job)
                planner.unblock(job, now_s)

    def _follow_step_times(self) -> None:
        """Fit the ladder to what steps take, and the steps to the gap bound."""
        policy, running = self.planner.policy, self.planner.running
        config, batch_limit = self.fastserve_config, self.max_num_active_reqs
        rebase(policy, config, self.step_time, batch_limit, running)
        # vLLM reads its token budget anew in every step.
        self.max_num_scheduled_tokens = self.demand.token_budget()
        self._followed = self.step_time.revision

    def _apply(self, plan: StepPlan) -> None:
        """Show vLLM the plan: a narrowed, ordered `running`, and the queued that may start."""
        self.moves.make_room(plan)
        for job in (*plan.paused, *plan.swapped_out):
            # A job that came back from the host and has not run waits among the waiting.
            if job.handle.status == RequestStatus.RUNNING:
                self.left_out[job.handle] = None
        queued = []
        for job in plan.started:
            if job.handle in self.left_out:
                del self.left_out[job.handle]
            else:
                queued.append(job.handle)
        resident = [job.handle for job in plan.batch]
        if queued:
            entering = set(queued)
            resident = [request for request in resident if request not in entering]
            queued = [job.handle for job in plan.batch if job.handle in entering]
        self.running = resident
        self.waiting.plan(queued)
        self.kv_holding_waiting.plan(queued)
        self.moves.begin(plan)

    def _reconcile(self, plan: StepPlan, output: SchedulerOutput, now_s: float) -> None:
        """Follow what vLLM did where it could not follow the plan; track prefills."""
        scheduled = output.num_scheduled_tokens
        self.start_refused = False
        if len(scheduled) != len(plan.batch):
            self.waiting.plan(())
            self.kv_holding_waiting.plan(())
            for job in plan.batch:
                if job.job_id not in scheduled and job.state is JobState.RUNNING:
                    self._missed(job, now_s)
        if plan.single_tokens:
            return
        decode_tokens = self.demand.decode_tokens
        for job in [job for job in plan.batch if job.next_tokens != decode_tokens]:
            request = job.handle
            if request.is_prefill_chunk:
                job.next_tokens = request.num_tokens - request.num_computed_tokens
            elif job.job_id in scheduled:
                job.next_tokens = decode_tokens

    def _missed(self, job: Job, now_s: float) -> None:
        request: Request = job.handle
        if request.status == RequestStatus.RUNNING:
            self.planner.missed(job, now_s)
            self.running.remove(request)
            self.left_out[request] = None
        elif self._is_blocked_waiting_status(request.status):
            self._block(job)
        elif request.status == RequestStatus.PREEMPTED and request.num_computed_tokens:
            # It came back from the host, and vLLM found no tokens or watermark for it.
            self.planner.missed(job, now_s)
        else:
            self.start_refused = True
            self.planner.evict(job, now_s)

    # ---- life of a request ----------------------------------------------------------------

    def _enqueue_waiting_request(self, request: Request) -> None:
        """A request arrives, or a session's turn ends and it waits for input."""
        super()._enqueue_waiting_request(request)
        job = self._jobs.get(request.request_id)
        if job is None:
            job = Job(
                request.request_id, request.num_prompt_tokens, request.priority, handle=request
            )
            self._jobs[request.request_id] = job
            if not self._is_blocked_waiting_status(request.status):
                self.demand.size_up(job)
                self.planner.add(job, self.clock())
                return
            self.planner.add_blocked(job)
        self.left_out.pop(request, None)
        self._block(job)

    def _block(self, job: Job) -> None:
        self.planner.block(job)
        self._blocked[job] = None

    def release(self, request: Request, *, drop_output: bool = False) -> None:
        """Free the device blocks of a resident request, which then waits like a preempted one.

        Args:
            request: it runs, is paused, or has come back from the host.
            drop_output: what steps in flight make of it is wrong.
        """
        if request.status == RequestStatus.RUNNING:
            if request in self.left_out:
                del self.left_out[request]
            else:
                self.running.remove(request)
            self.moves.leaving(request)
            drop_output |= self.requires_kv_delivery
            super()._preempt_request(request, time.monotonic(), drop_stale_output=drop_output)
            return
        # It came back from the host and has not run since: vLLM knows it as preempted already.
        self.kv_holding_waiting.remove_request(request)
        self.kv_cache_manager.free(request)
        request.num_computed_tokens = 0
        self.waiting.add_request(request)

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        """When vLLM itself takes a request's blocks, its KV cache goes to the host or is lost."""
        spilled = not self._resetting and self.moves.spill(request)
        self.moves.leaving(request)
        super()._preempt_request(request, timestamp, drop_stale_output)
        self.moves.start_over(self._jobs[request.request_id], spilled=spilled)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """A request finished or was aborted, in whatever state."""
        self.moves.leaving(request)
        job = self._jobs.pop(request.request_id)
        self.planner.remove(job)
        self._blocked.pop(job, None)
        self.left_out.pop(request, None)
        return super()._free_request(request, delay_free_blocks)

    # ---- with asynchronous scheduling off, vLLM would have picked its plain scheduler ---------

    def _be_synchronous(self) -> None:
        """Expect output tokens ahead of time only where steps are scheduled ahead of them.

        Bound once, because vLLM calls the second one for every token.
        """
        plain: Any = super(AsyncScheduler, self)
        self._update_after_schedule = plain._update_after_schedule
        self._update_request_with_output = plain._update_request_with_output

    # ---- what vLLM asks about all of its requests -------------------------------------------

    def get_request_counts(self) -> tuple[int, int]:
        """(running or paused, waiting)."""
        running, waiting = super().get_request_counts()
        return running + len(self.left_out), waiting

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """As vLLM's; paused requests hold KV cache like running ones."""
        with self._all_residents():
            if reset_running_requests:
                self.moves.forget_all()
            self._resetting = reset_running_requests
            try:
                successful = super().reset_prefix_cache(reset_running_requests, reset_connector)
            finally:
                self._resetting = False
        if successful:
            self.moves.forget_all()
        return successful

    @contextmanager
    def _all_residents(self) -> Iterator[None]:
        """Show vLLM the paused requests, too, where it looks through all that hold KV cache."""
        self.running = [*self.running, *self.left_out]
        self.left_out.clear()
        try:
            yield
        finally:
            batch = {job.handle for job in self.planner.running}
            self.left_out.update((r, None) for r in self.running if r not in batch)
            self.running = [r for r in self.running if r in batch]

    def shutdown(self) -> None:
        """As vLLM's; saves the step-time profile once more."""
        self.timer.save(self.clock())
        close_trace(self.planner)
        super().shutdown()

    def check_integrity(self) -> None:
        """Invariant I1 across vLLM's containers and the planner's. For tests and debugging.

        Raises:
            AssertionError: naming what disagrees.
        """
        self.planner.check_integrity()
        running, left_out = set(self.running), set(self.left_out)
        waiting = {*self.waiting, *self.kv_holding_waiting}
        if self.exchange is not None:
            self.exchange.manager.check_integrity()
        assert not running & left_out, "I1: running and left out"
        assert not (running | left_out) & waiting, "I1: resident and waiting"
        assert self._jobs.keys() == {r.request_id for r in running | left_out | waiting}, "I1"
        for job in self._jobs.values():
            expected = {
                JobState.RUNNING: running,
                JobState.PAUSED: left_out | waiting,
                JobState.SWAPPING_OUT: left_out,
            }
            assert job.handle in expected.get(job.state, waiting), f"I1: {job}"
