"""Answers the planner's questions about requests and blocks from vLLM's own state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus

from fastserve_vllm.policy.budget import StepLimits, token_budget
from fastserve_vllm.policy.job import Job, JobState

if TYPE_CHECKING:
    from fastserve_vllm.scheduler import FastServeScheduler


class HostDemand:
    """A `Demand`: what a job's next step needs, and what its KV cache is worth.

    It also sizes jobs up: the tokens that they compute next, and how long their first step takes.
    """

    def __init__(self, scheduler: "FastServeScheduler") -> None:
        self._scheduler = scheduler
        self._kv = scheduler.kv_cache_manager
        self._overlapping = scheduler.vllm_config.max_concurrent_batches > 1
        config, lora = scheduler.scheduler_config, scheduler.lora_config
        self.decode_tokens = 1 + scheduler.num_spec_tokens
        self._most_tokens: int = scheduler.max_num_scheduled_tokens
        # Where a prefill cannot be cut, or only at the boundaries of a state-space model's blocks,
        # a smaller budget may be none at all.
        self._narrows = config.enable_chunked_prefill and not scheduler.has_mamba_layers
        # Computed tokens whose KV cache was given up so far.
        self.lost_tokens = 0
        self._chunk = config.long_prefill_token_threshold or 1 << 62
        self._chunked = config.enable_chunked_prefill
        self._max_adapters = lora.max_loras if lora is not None else None
        groups = scheduler.kv_cache_config.kv_cache_groups
        sizes = [group.kv_cache_spec.block_size for group in groups]
        self._block_tokens = min(sizes, default=scheduler.block_size)
        # Whether a request's blocks hold all of its tokens, and stay until it leaves.
        self.full_attention = all(isinstance(g.kv_cache_spec, FullAttentionSpec) for g in groups)
        # A decode of one token needs blocks at the boundaries of the smallest ones only: sizes are
        # multiples of each other.
        self._plain = self.full_attention and self.decode_tokens == 1
        # A decode may cross one block boundary a group, or more where it drafts tokens ahead.
        self._block_bound = len(groups) * (1 + self.decode_tokens // self._block_tokens)

    def limits(self) -> StepLimits:
        """The room of the step that is about to be planned."""
        scheduler = self._scheduler
        sessions = scheduler.num_waiting_for_streaming_input
        roster = scheduler.planner.roster
        slots = None
        if scheduler.use_v2_model_runner:
            held = roster.num_residents + sessions
            slots = scheduler.max_num_running_reqs - held
        return StepLimits(
            batch_limit=max(scheduler.max_num_active_reqs - sessions, 0),
            token_budget=scheduler.max_num_scheduled_tokens,
            decode_tokens=self.decode_tokens,
            prefill_chunk=self._chunk,
            chunked_prefill=self._chunked,
            free_blocks=self._kv.block_pool.get_num_free_blocks(),
            block_bound=self._block_bound,
            block_tokens=self._block_tokens,
            headroom_blocks=self._kv.watermark_blocks,
            occupied=roster.occupied,
            free_slots=slots,
            max_adapters=self._max_adapters,
            overlapping=self._overlapping,
            admit_queued=scheduler._pause_state is PauseState.UNPAUSED and not self._must_drain(),
        )

    def token_budget(self) -> int:
        """Tokens of the next step: the engine's limit, or what the gap bound leaves of it."""
        scheduler = self._scheduler
        if not self._narrows:
            return self._most_tokens
        decodes = scheduler.max_num_active_reqs * self.decode_tokens
        gap_s = scheduler.planner.policy.gap_s
        return token_budget(scheduler.step_time, gap_s, self._most_tokens, decodes)

    def _must_drain(self) -> bool:
        """Whether those who have loaded KV cache from elsewhere go first in this step.

        vLLM refuses a start that would leave no room for them. Whoever it refused may stand before
        them in the order, and be planned and refused for ever.
        """
        scheduler = self._scheduler
        return scheduler.start_refused and any(
            request.num_computed_tokens and not scheduler._is_blocked_waiting_status(request.status)
            for request in scheduler.kv_holding_waiting
        )

    def unready(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs for which vLLM would not schedule a token now.

        One loop, for it runs over the batch in every step whose predecessor is in flight.
        """
        step = self._scheduler.current_step + 1
        running = RequestStatus.RUNNING
        found = []
        for job in jobs:
            request: Request = job.handle
            placeholders = request.num_output_placeholders
            if request.status != running:
                stuck = request.num_stale_output_tokens > 0 and not request.drop_stale_output
            elif placeholders:
                # The output in flight is the last: vLLM schedules no step beyond it.
                stuck = (
                    request.num_computed_tokens + 2 - placeholders
                    >= request.num_prompt_tokens + request.max_tokens
                    or step < request.next_decode_eligible_step
                )
            else:
                stuck = request.num_tokens_with_spec <= request.num_computed_tokens
            if stuck:
                found.append(job)
        return found

    def new_blocks(self, job: Job) -> int:
        """Blocks that the job's next step needs; a queued job needs room for all of its prompt."""
        request: Request = job.handle
        runs = request.status == RequestStatus.RUNNING
        # A token in flight may cross a boundary that neither of the counts below sees yet.
        ahead = runs and request.num_output_placeholders > 0
        decodes = self._plain and runs and not ahead and job.next_tokens == 1
        if decodes and request.num_computed_tokens % self._block_tokens:
            return 0
        missing = self._scheduler._request_remaining_blocks(request)
        if runs:
            return missing + (self._block_bound if ahead else 0)
        return missing - self._shared_blocks(request) if missing else 0

    def freed_blocks(self, job: Job) -> int | None:
        """Blocks that only this job holds; None while a step in flight may still write them."""
        request: Request = job.handle
        if request.status != RequestStatus.RUNNING and job.state is not JobState.PAUSED:
            return None
        if not self._scheduler._request_blocks_can_be_freed(request):
            return None
        exchange = self._scheduler.exchange
        if exchange is not None and exchange.is_saving(request):
            return None
        groups = self._kv.get_blocks(request.request_id).blocks
        return sum(block.ref_cnt == 1 and not block.is_null for group in groups for block in group)

    def adapter(self, job: Job) -> int:
        """Id of the request's LoRA adapter, 0 for none."""
        lora = job.handle.lora_request
        return 0 if lora is None else lora.lora_int_id

    def holds_kv(self, job: Job) -> bool:
        """Whether blocks are allocated to the request."""
        request: Request = job.handle
        return request.status == RequestStatus.RUNNING or request.num_computed_tokens > 0

    def cached_tokens(self, request: Request) -> int:
        """Prompt tokens found in the prefix cache."""
        return self._kv.get_computed_blocks(request)[1]

    def _shared_blocks(self, request: Request) -> int:
        """Cached prompt blocks that others hold: adopting them takes nothing from the free ones."""
        if request.num_computed_tokens:
            return 0
        groups = self._kv.get_computed_blocks(request)[0].blocks
        return sum(block.ref_cnt > 0 and not block.is_null for group in groups for block in group)

    # ---- what a job computes next -----------------------------------------------------------

    def size_up(self, job: Job) -> None:
        """Of a job that arrives: predict the first step from the tokens that are not cached."""
        request: Request = job.handle
        cached = request.num_computed_tokens or self.cached_tokens(request)
        uncached = max(request.num_tokens - cached, 1)
        job.prompt_tokens = request.num_prompt_tokens
        job.first_step_s = self._prefill_s(uncached)
        job.next_tokens = uncached

    def size_up_again(self, job: Job) -> None:
        """Of a job that lost its device blocks: it computes all tokens that the host lacks."""
        request: Request = job.handle
        exchange = self._scheduler.exchange
        job.swapped_tokens = 0 if exchange is None else exchange.matched_tokens(request, 0)
        lacking = request.num_tokens - job.swapped_tokens
        self.lost_tokens += max(lacking - job.next_tokens, 0)
        job.next_tokens = self._step_tokens(lacking)
        job.first_step_s = self._prefill_s(job.next_tokens)

    def size_up_rest(self, job: Job) -> None:
        """Of a job whose KV cache is on the device."""
        request: Request = job.handle
        job.next_tokens = self._step_tokens(request.num_tokens - request.num_computed_tokens)

    def _step_tokens(self, tokens: int) -> int:
        """One token is a decode, which may compute some drafts beside it."""
        return tokens if tokens > 1 else self.decode_tokens

    def _prefill_s(self, tokens: int) -> float:
        scheduler = self._scheduler
        return scheduler.step_time.prefill_s(tokens, self._most_tokens)
