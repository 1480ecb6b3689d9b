"""Moves requests' KV cache between device and host, on vLLM's scheduler side.

The policy says who moves. This module knows what that means for vLLM's requests and blocks: what
is allocated, what stays fenced while a copy is in flight, and what a finished copy releases.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.kv_swap.manager import INVALIDATED, Completion, CopyState, SwapManager
from fastserve_vllm.kv_swap.transfers import Direction, Report, Transfer
from fastserve_vllm.kv_swap.worker import block_bytes, host_block_count
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.step_time import StepTimeModel

if TYPE_CHECKING:
    from fastserve_vllm.scheduler import FastServeScheduler

logger = init_logger(__name__)

_GIB = 1 << 30
# Until copies have been measured: what a PCIe 4.0 device reaches.
_PRIOR_BYTES_PER_S = 20e9
_BANDWIDTH_MEMORY = 0.9


class Bandwidth:
    """Copy bandwidth of one worker in bytes/s, as the workers measure it."""

    def __init__(self) -> None:
        self.bytes_per_s = _PRIOR_BYTES_PER_S

    def learn(self, report: Report) -> None:
        """Take in what the workers copied and how long it took them."""
        copied, seconds = sum(report.copied_bytes.values()), sum(report.copy_s.values())
        if copied and seconds:
            old, new = self.bytes_per_s, copied / seconds
            self.bytes_per_s = _BANDWIDTH_MEMORY * old + (1 - _BANDWIDTH_MEMORY) * new


class KvExchange:
    """A `SwapDemand`, and the arrows between device and host.

    Args:
        scheduler: vLLM's scheduler, whose requests and blocks are moved.
        config: FastServe's configuration.
        step_time: what computing tokens costs.
    """

    def __init__(
        self, scheduler: "FastServeScheduler", config: FastServeConfig, step_time: StepTimeModel
    ) -> None:
        vllm_config, kv_cache_config = scheduler.vllm_config, scheduler.kv_cache_config
        swap_space = int(config.swap_space_gib * _GIB)
        sizes = [g.kv_cache_spec.block_size for g in kv_cache_config.kv_cache_groups]
        self._scheduler = scheduler
        self._kv = scheduler.kv_cache_manager
        self._step_time = step_time
        self._block_tokens = min(sizes, default=scheduler.block_size)
        # Tokens that fill whole blocks of every group: sizes are multiples of each other.
        self._group_tokens = max(sizes, default=scheduler.block_size)
        self._block_bytes = block_bytes(vllm_config, kv_cache_config)
        # A block's hash names its content; only where blocks are hashed one by one is it its key.
        self._keyed = self._kv.enable_caching and len(sizes) == 1
        # Blocks that fall out of a window are freed while their request runs: not to be read then.
        self._saves = scheduler.demand.full_attention
        self.bandwidth = Bandwidth()
        self.waited_s = 0.0
        workers = vllm_config.parallel_config.world_size
        # From the start on, so that rates are right from the first copy on.
        self.copies = Counter({f"{r},{d.value}": 0 for r in range(workers) for d in Direction})
        self.copied_bytes = dict.fromkeys([d.value for d in Direction], 0)
        self.copy_s = dict.fromkeys([d.value for d in Direction], 0.0)
        self.host_blocks = host_block_count(vllm_config, kv_cache_config, swap_space)
        self.manager = SwapManager(
            self.host_blocks,
            sizes,
            workers=workers,
            null_block=self._kv.block_pool.null_block.block_id,
        )
        self._failed: set[str] = set()
        self._causes: set[str] = set()
        self._flush = False
        self._completions: list[Completion] = []
        # Whether the workers have reported anything since `completions` was last called.
        self.has_news = False

    # ---- what the planner asks --------------------------------------------------------------

    def new_blocks(self, job: Job) -> int:
        """Device blocks that the job's next step needs."""
        return self._scheduler.demand.new_blocks(job)

    def freed_blocks(self, job: Job) -> int | None:
        """Device blocks that the job's leaving frees; None: it cannot leave now."""
        return self._scheduler.demand.freed_blocks(job)

    def out_s(self, job: Job) -> float:
        """Seconds of copying to the host what it lacks of the job's KV cache."""
        request: Request = job.handle
        missing = self._blocks_of(request.num_computed_tokens) - self._saved_blocks(request)
        return max(missing, 0) * self.block_s

    def in_s(self, job: Job) -> float:
        """Seconds of copying the job's KV cache to the device."""
        request: Request = job.handle
        tokens = request.num_computed_tokens or self.manager.tokens(request.request_id)
        return self._blocks_of(tokens) * self.block_s

    def unsaved_blocks(self, job: Job) -> int:
        """Full device blocks of the job that the host lacks; 0 while some are on their way."""
        request: Request = job.handle
        if not self._saves or request.status != RequestStatus.RUNNING:
            return 0
        if not self._can_leave(request):
            return 0
        return self._final_tokens(request) // self._block_tokens - self._saved_blocks(request)

    def _can_leave(self, request: Request) -> bool:
        """Whether a copy to the host may begin: none is in flight, and none has failed."""
        resting = self.manager.state(request.request_id) in (None, CopyState.RETAINED)
        return resting and request.request_id not in self._failed

    @property
    def block_s(self) -> float:
        """Seconds of copying a block one way, by the measured bandwidth."""
        return self._block_bytes / self.bandwidth.bytes_per_s

    def _blocks_of(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _saved_blocks(self, request: Request) -> int:
        """Full blocks of the request that the host has."""
        return self.manager.retained_tokens(request.request_id) // self._block_tokens

    def _final_tokens(self, request: Request) -> int:
        """Computed tokens that no step in flight may still write, and no rejection takes back."""
        return max(request.num_computed_tokens - request.num_in_flight_tokens, 0)

    def recompute_s(self, job: Job) -> float:
        """Seconds that computing the job's tokens again adds to steps that run anyway."""
        return job.handle.num_computed_tokens * self._step_time.prefill_token_s

    def has_host_room(self, job: Job) -> bool:
        """Whether the host can take the job's KV cache."""
        request: Request = job.handle
        if request.request_id in self._failed or not request.num_computed_tokens:
            return False
        return self.manager.has_room(
            request.request_id,
            self._blocks(request),
            request.num_computed_tokens,
            keys=self._keys(request),
        )

    # ---- the arrows -------------------------------------------------------------------------

    def copy_out(self, request: Request, *, urgent: bool) -> Transfer | None:
        """Copy the request's KV cache to the host; None: there is no room, or nothing to copy.

        Urgent: its device blocks may be freed at once. Otherwise they have to stay until
        `completed` says so; an empty transfer has completed already.
        """
        if not request.num_computed_tokens or not self._can_leave(request):
            return None
        return self.manager.swap_out(
            request.request_id,
            self._blocks(request),
            request.num_computed_tokens,
            keys=self._keys(request),
            urgent=urgent,
        )

    def save(self, request: Request) -> None:
        """Copy the request's full blocks in advance, while it goes on."""
        size = self._group_tokens
        tokens = self._final_tokens(request) // size * size
        if tokens:
            self.manager.save(
                request.request_id, self._blocks(request), tokens, keys=self._keys(request)
            )

    def is_saving(self, request: Request) -> bool:
        """Whether a copy in flight needs the blocks of a request that goes on."""
        return self.manager.state(request.request_id) is CopyState.SAVING

    def abandon(self, request: Request) -> None:
        """The request's device blocks are freed: a copy that still reads them is of no use."""
        if self.is_saving(request):
            self.manager.invalidate(request.request_id)

    def copy_in(self, request: Request) -> Transfer | None:
        """Allocate device blocks to a swapped request and fill them; None: there is no room.

        What the prefix cache still holds is adopted instead of copied. The request waits for
        remote KV, in vLLM's terms, until the copy has completed.
        """
        tokens = self._restorable_tokens(request)
        cached, cached_tokens = self._kv.get_computed_blocks(request)[:2]
        tokens = max(tokens, cached_tokens)
        allocated = self._kv.allocate_slots(
            request,
            0,
            num_new_computed_tokens=cached_tokens,
            new_computed_blocks=cached,
            num_external_computed_tokens=tokens - cached_tokens,
            delay_cache_blocks=True,
        )
        if allocated is None:
            return None
        self._scheduler.waiting.remove_request(request)
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        request.num_computed_tokens = tokens
        self._scheduler.kv_holding_waiting.add_request(request)
        return self.manager.swap_in(
            request.request_id, self._blocks(request), tokens=tokens, first_token=cached_tokens
        )

    def matched_tokens(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens beyond `num_computed_tokens` that come back from the host on demand."""
        if self.manager.state(request.request_id) is not CopyState.SWAPPED:
            return 0
        tokens = self._restorable_tokens(request)
        return max(tokens - num_computed_tokens, 0)

    def allocated(self, request: Request, num_external_tokens: int) -> None:
        """Fill the blocks that vLLM has allocated to a request, in this very step."""
        if self.manager.state(request.request_id) is not CopyState.SWAPPED:
            return
        if not num_external_tokens:
            self.manager.invalidate(request.request_id)
            return
        tokens = self._restorable_tokens(request)
        self.manager.swap_in(
            request.request_id,
            self._blocks(request),
            tokens=tokens,
            first_token=tokens - num_external_tokens,
            urgent=True,
        )

    def finished(self, request: Request) -> bool:
        """The request is gone; whether a copy in flight still needs its device blocks."""
        self._failed.discard(request.request_id)
        return self.manager.discard(request.request_id) is not None

    def spoiled_by(self, report: Report) -> set[int]:
        """Device blocks that steps in flight took for filled and that are not, for copies failed.

        Their requests have to be told from the report itself: once it is taken in, it is too late
        to hold back the step's output.
        """
        blocks = set[int]()
        for flight, cause in self.manager.failing(report):
            if not flight.copy.discarded:
                self._note_failure(flight.copy.request_id, cause)
            blocks.update(flight.copy.urgent_loads(flight.transfer.transfer_id))
        return blocks

    def forsake(self, request: Request) -> bool:
        """What the host has of the request may be wrong; whether its KV cache was only there."""
        swapped = self.manager.state(request.request_id) is CopyState.SWAPPED
        self.manager.invalidate(request.request_id)
        return swapped

    def abandon_all(self) -> None:
        """All KV cache has become invalid, copies in flight included.

        vLLM frees the blocks of the latter at once, so the next step has to wait for them.
        """
        self._flush |= self.manager.in_flight > 0
        self.manager.invalidate_all()

    def take_flush(self) -> bool:
        """Whether this step has to begin by finishing every copy in flight."""
        flush, self._flush = self._flush, False
        return flush

    def take_in(self, report: Report, output: KVConnectorOutput) -> None:
        """Take in what the workers did, and tell vLLM whose blocks it may free or use."""
        self.has_news = True
        self.bandwidth.learn(report)
        self.waited_s += report.waited_s
        self.copies.update(report.copies)
        for direction, copied in report.copied_bytes.items():
            self.copied_bytes[direction] += copied
            self.copy_s[direction] += report.copy_s.get(direction, 0.0)
        for completion in self.manager.report(report):
            if completion.cause not in (None, INVALIDATED) and not completion.discarded:
                self._note_failure(completion.request_id, completion.cause)
            if completion.direction is Direction.IN:
                self._hand_over(completion, output)
            elif completion.discarded:
                output.finished_sending = {*(output.finished_sending or ()), completion.request_id}
            if not completion.discarded:
                self._completions.append(completion)

    def completions(self) -> Sequence[Completion]:
        """What has completed since the last call, for requests that still live."""
        done, self._completions = self._completions, []
        self.has_news = False
        return done

    def _hand_over(self, completion: Completion, output: KVConnectorOutput) -> None:
        """Pass a finished copy to vLLM, like KV that came from elsewhere."""
        request = self._scheduler.requests.get(completion.request_id)
        if request is None:
            return
        waits = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        if not waits and not completion.discarded:
            return
        if completion.cause is not None and waits:
            request.num_computed_tokens = 0
            self._scheduler.failed_recving_kv_req_ids.add(request.request_id)
        output.finished_recving = {*(output.finished_recving or ()), request.request_id}

    def _note_failure(self, request_id: str, cause: str) -> None:
        """Remember who must not be swapped again; log every cause once."""
        self._failed.add(request_id)
        if cause not in self._causes:
            self._causes.add(cause)
            logger.warning(
                "FastServe: a KV copy failed (%s); the request is computed again instead. "
                "Further failures of this kind are counted, not logged.",
                cause,
            )

    def _restorable_tokens(self, request: Request) -> int:
        """Tokens of the host copy that are the request's still: drafts may have been rejected."""
        return min(self.manager.tokens(request.request_id), request.num_tokens - 1)

    def _blocks(self, request: Request) -> tuple[list[int], ...]:
        return self._kv.get_block_ids(request.request_id)

    def _keys(self, request: Request) -> Sequence[Sequence[Hashable]]:
        return (request.block_hashes,) if self._keyed else ()
