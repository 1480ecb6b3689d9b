"""KV cache that leaves the device and comes back: begins the copies, follows how they end."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from fastserve_vllm.kv_swap.exchange import KvExchange
from fastserve_vllm.kv_swap.manager import Completion
from fastserve_vllm.kv_swap.metadata import find_report
from fastserve_vllm.kv_swap.transfers import Direction
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.step_plan import StepPlan
from fastserve_vllm.spoiled import BlockHistory

if TYPE_CHECKING:
    from fastserve_vllm.scheduler import FastServeScheduler


@dataclass(frozen=True, slots=True)
class Spoiled:
    """What failed copies have spoiled.

    Attributes:
        blocks: device blocks whose content is not what their requests' tokens make it.
        sharers: jobs that hold such a block beside one before them.
    """

    blocks: set[int]
    sharers: list[Job]


class SwapMoves:
    """Keeps vLLM's requests and the planner's jobs in step while KV cache moves or is lost.

    Args:
        scheduler: it frees device blocks and knows the time.
        jobs: the live jobs by request id.
    """

    def __init__(self, scheduler: "FastServeScheduler", jobs: Mapping[str, Job]) -> None:
        self._scheduler = scheduler
        self._jobs = jobs
        self._planner = scheduler.planner
        self._demand = scheduler.demand
        self._exchange = scheduler.exchange
        self.history = BlockHistory(scheduler)

    # ---- what a plan asks for ---------------------------------------------------------------

    def make_room(self, plan: StepPlan) -> None:
        """Take the device blocks of the jobs that the plan spills or recomputes."""
        for job in plan.spilled:
            spilled = self.spill(job.handle)
            self._scheduler.release(job.handle)
            if spilled:
                self._demand.size_up_again(job)
            else:
                self.start_over(job)
        for job in plan.recomputed:
            self._scheduler.release(job.handle)
            self._demand.size_up_again(job)

    def begin(self, plan: StepPlan) -> None:
        """Start the copies that run beside the step."""
        exchange = self._exchange
        if exchange is None:
            return
        for job in plan.swapped_out:
            self._send_out(job, exchange)
        for job in plan.swapped_in:
            self._bring_in(job, exchange)
        for job in plan.saved:
            exchange.save(job.handle)

    def leaving(self, request: Request) -> None:
        """The request's device blocks are about to be freed."""
        if self._exchange is not None:
            self._exchange.abandon(request)
            self.history.leaving(request)

    def spill(self, request: Request) -> bool:
        """Copy the KV cache to the host before its blocks are written again, if possible."""
        if self._exchange is None:
            return False
        return self._exchange.copy_out(request, urgent=True) is not None

    def _send_out(self, job: Job, exchange: KvExchange) -> None:
        """Start copying the KV cache of a job that was left out; its blocks stay until it is."""
        transfer = exchange.copy_out(job.handle, urgent=False)
        if transfer is None:
            self._planner.stayed(job)
        elif not transfer.device_blocks:
            self._sent_out(job)

    def _bring_in(self, job: Job, exchange: KvExchange) -> None:
        """Start copying the KV cache of a swapped job back."""
        transfer = exchange.copy_in(job.handle)
        if transfer is None:
            self._planner.evict(job, self._scheduler.clock(), spilled=True)
        elif not transfer.device_blocks:
            self._scheduler.finished_recving_kv_req_ids.add(job.job_id)
            self._brought_in(job)

    # ---- what becomes of the copies ---------------------------------------------------------

    def take_back(self, output: KVConnectorOutput | None) -> None:
        """Before vLLM delivers a step's output: what of it failed copies have spoiled is dropped.

        Whoever computed on what never arrived computes again, and nobody finds any of it in the
        prefix cache or on the host.
        """
        self.history.step_ended()
        exchange, report = self._exchange, find_report(output)
        if exchange is None or report is None or not report.failed:
            return
        blocks = exchange.spoiled_by(report)
        if not blocks:
            return
        for request, holds_some in self.history.spread(blocks, exchange.manager.urgent_loads):
            self._take_back(request, exchange, holds_some=holds_some)
        self._scheduler.kv_cache_manager.evict_blocks(blocks)

    def _take_back(self, request: Request, exchange: KvExchange, *, holds_some: bool) -> None:
        """The request has computed on spoiled blocks, and may hold some."""
        if request.num_stale_output_tokens:
            request.drop_stale_output = True
        was_swapped = exchange.forsake(request)
        job = self._jobs.get(request.request_id)
        if job is None or job.handle is not request:
            return
        if job.state is JobState.SWAPPING_OUT:
            self._planner.stayed(job)
        if holds_some and job.state in (JobState.RUNNING, JobState.PAUSED):
            self._lose(job)
        elif was_swapped:
            self.start_over(job)

    def follow(self, exchange: KvExchange) -> None:
        """Take in the copies that have completed."""
        for completion in exchange.completions():
            job = self._jobs.get(completion.request_id)
            if job is not None:
                self._copied(job, completion)

    def spoiled(self, invalid_blocks: Collection[int]) -> Spoiled:
        """What failed copies have spoiled: the blocks that could not be filled, and all after them.

        vLLM lets the first holder of such a block compute it again, and all others, and whoever
        finds it in the prefix cache, rely on that. It holds only where that one runs on at once,
        and here it may be preempted.
        """
        found, seen = Spoiled(set(), []), set[int]()
        for request in (*self._scheduler.running, *self._scheduler.left_out):
            held = set[int]()
            for blocks in self._scheduler.kv_cache_manager.get_block_ids(request.request_id):
                places = [i for i, block in enumerate(blocks) if block in invalid_blocks]
                held.update(blocks[i] for i in places)
                found.blocks.update(blocks[places[0] :] if places else ())
            if held & seen:
                found.sharers.append(self._jobs[request.request_id])
            seen |= held
        return found

    def recover(self, spoiled: Spoiled) -> None:
        """Follow vLLM, which has set requests back to the last token whose KV cache is valid."""
        self._scheduler.kv_cache_manager.evict_blocks(spoiled.blocks)
        for job in spoiled.sharers:
            if job.state in (JobState.RUNNING, JobState.PAUSED):
                self._lose(job)
        for job in self._planner.running:
            self._demand.size_up_rest(job)

    def _copied(self, job: Job, completion: Completion) -> None:
        """A copy has completed of a request that still lives, and may have been reset since."""
        if job.state is JobState.SWAPPING_IN and completion.direction is Direction.IN:
            self._brought_in(job)
        elif job.state is JobState.SWAPPING_OUT and completion.direction is Direction.OUT:
            if completion.cause is None:
                self._sent_out(job)
            else:
                self._planner.stayed(job)
                if completion.lost:
                    self._lose(job)
        elif completion.lost and job.state in (JobState.SWAPPED, JobState.QUEUED):
            self.start_over(job)
        elif completion.lost and job.state in (JobState.RUNNING, JobState.PAUSED):
            self._lose(job)

    def _sent_out(self, job: Job) -> None:
        self._scheduler.release(job.handle)
        self._planner.swapped_out(job)
        self._demand.size_up_again(job)

    def _brought_in(self, job: Job) -> None:
        """The copy has ended, well or not; let vLLM take note."""
        request: Request = job.handle
        self._scheduler._handle_blocked_waiting_request(request)
        if request.num_computed_tokens:
            self._demand.size_up_rest(job)
            self._planner.swapped_in(job)
            return
        self._scheduler.kv_holding_waiting.remove_request(request)
        self._scheduler.waiting.add_request(request)
        self.start_over(job)

    def _lose(self, job: Job) -> None:
        """The job's KV cache on the device is of no use, nor is what steps in flight make of it."""
        self._scheduler.release(job.handle, drop_output=True)
        # It may start again in the very next step, as nobody does who is preempted in a step: the
        # workers have to be told of all of its tokens then.
        self._scheduler.prev_step_scheduled_req_ids.discard(job.job_id)
        self.start_over(job, cause="copy_failed")

    def start_over(self, job: Job, *, spilled: bool = False, cause: str = "host") -> None:
        """The job's device blocks are gone: it computes all tokens again that the host lacks.

        Args:
            job: in whatever state.
            spilled: its KV cache is on the host.
            cause: of the preemption, if it runs; see `StepCounters`.
        """
        self._planner.evict(job, self._scheduler.clock(), spilled=spilled, cause=cause)
        self._demand.size_up_again(job)

    def forget_all(self) -> None:
        """KV cache that is on the host, on its way, or just back is not valid any more."""
        if self._exchange is None:
            return
        self._exchange.abandon_all()
        for job in list(self._planner.jobs):
            request: Request = job.handle
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS and (
                job.state is JobState.SWAPPING_IN
            ):
                request.status = RequestStatus.PREEMPTED
            elif job.state is not JobState.SWAPPED and not (
                job.state is JobState.PAUSED and request.status == RequestStatus.PREEMPTED
            ):
                continue
            if request.num_computed_tokens:
                self._scheduler.release(request)
            self.start_over(job)
