"""A real scheduler on real vLLM objects without a model: for tests, benchmarks and fuzzing."""

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from fastserve_vllm.kv_swap.metadata import SwapMetadata, SwapWorkerMetadata
from fastserve_vllm.kv_swap.transfers import Report, Transfer
from fastserve_vllm.selection import select

_ARGUMENTS: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_batched_tokens": 2048,
    "block_size": 32,
    "enforce_eager": True,
    "skip_tokenizer_init": True,
}


class ManualClock:
    """A clock that moves only when told to; calling it reads the time in seconds."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Read the time."""
        return self.now_s


def vllm_config(model: str, fastserve: Mapping[str, Any] | None = None, **args: Any) -> VllmConfig:
    """A vLLM configuration as the engine would build it.

    Args:
        model: path of a model folder.
        fastserve: FastServe's configuration; None leaves stock scheduling selected.
        args: engine arguments; `async_scheduling` and `pipeline_parallel_size` take effect even
            on platforms that refuse them, for no model runs.
    """
    forced = {k: args.pop(k) for k in ("async_scheduling", "pipeline_parallel_size") if k in args}
    engine_args = EngineArgs(model=model, **{**_ARGUMENTS, **args})
    if fastserve is not None:
        select(engine_args, fastserve)
    config = engine_args.create_engine_config()
    config.scheduler_config.async_scheduling = forced.get("async_scheduling", False)
    config.parallel_config.pipeline_parallel_size = forced.get("pipeline_parallel_size", 1)
    return config


class ModelFreeEngine:
    """Steps a scheduler; a stand-in for the model runner answers with counted-up tokens.

    Args:
        config: from `vllm_config`.
        num_blocks: device blocks, the null block included.
        make: builds the scheduler from vLLM's arguments; None: the configured class, on `clock`.
        step_s: seconds that a step takes on `clock`, given what was scheduled.
        copy_steps: steps that complete before a KV copy that starts in one of them is reported.
    """

    def __init__(
        self,
        config: VllmConfig,
        num_blocks: int = 4096,
        make: Callable[..., Any] | None = None,
        step_s: Callable[[SchedulerOutput], float] = lambda _: 0.001,
        copy_steps: int = 0,
    ) -> None:
        self.config = config
        self.clock = ManualClock()
        self.step_s = step_s
        self.outputs: dict[str, list[int]] = {}
        self.in_flight: deque[SchedulerOutput] = deque()
        self.copy_steps = copy_steps
        self.transfers: list[Transfer] = []
        self._copies: deque[tuple[Transfer, ...]] = deque()
        self._tokens = itertools.count(10)
        config.cache_config.num_gpu_blocks = num_blocks
        block_size = config.cache_config.block_size
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(block_size, hash_fn)
        scheduler_cls = config.scheduler_config.get_scheduler_cls()
        make = make or (lambda **kwargs: scheduler_cls(**kwargs, clock=self.clock))
        self.scheduler = make(
            vllm_config=config,
            kv_cache_config=_kv_cache_config(num_blocks, block_size),
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            log_stats=True,
        )

    def request(
        self, request_id: str, prompt_tokens: int | list[int], max_tokens: int, **kwargs: Any
    ) -> Request:
        """A request; a prompt given by its length shares no prefix with any other."""
        if isinstance(prompt_tokens, int):
            prompt_tokens = [next(self._tokens) for _ in range(prompt_tokens)]
        params = kwargs.pop("sampling_params", None) or SamplingParams(
            temperature=0, ignore_eos=True, max_tokens=max_tokens
        )
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt_tokens,
            sampling_params=params,
            pooling_params=None,
            block_hasher=self._hasher,
            **kwargs,
        )

    def add(
        self, request_id: str, prompt_tokens: int | list[int], max_tokens: int, **kwargs: Any
    ) -> Request:
        """Make a request and hand it to the scheduler."""
        request = self.request(request_id, prompt_tokens, max_tokens, **kwargs)
        self.scheduler.add_request(request)
        return request

    def abort(self, *request_ids: str) -> None:
        """Abort requests, as a client that goes away does."""
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def step(self) -> dict[str, int]:
        """Schedule a step; complete the oldest one once the pipeline is full or has no more work.

        Returns:
            Tokens scheduled, by request id.
        """
        output = self.schedule()
        full = len(self.in_flight) >= self.config.max_concurrent_batches
        if full or not output.num_scheduled_tokens:
            self.complete()
        return dict(output.num_scheduled_tokens)

    def schedule(self) -> SchedulerOutput:
        """Schedule a step and leave it in flight."""
        output = self.scheduler.schedule()
        self.in_flight.append(output)
        return output

    def complete(self) -> None:
        """Complete the oldest step in flight."""
        output = self.in_flight.popleft()
        self.clock.now_s += self.step_s(output)
        results = self.scheduler.update_from_output(output, self._sample(output))
        for result in results.values():
            for one in result.outputs:
                self.outputs.setdefault(one.request_id, []).extend(one.new_token_ids)

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished or holds blocks, or a step that computes is in flight."""
        held = len(self.scheduler.requests) > sum(self.scheduler.get_request_counts())
        return (
            self.scheduler.has_unfinished_requests()
            or held
            or any(output.num_scheduled_tokens for output in self.in_flight)
        )

    def drain(self, max_steps: int = 10_000) -> int:
        """Step until every request has finished; returns the steps taken.

        Raises:
            RuntimeError: requests are left after `max_steps`.
        """
        for steps in range(max_steps):
            if not self.busy:
                return steps
            self.step()
        left = list(self.scheduler.requests)
        raise RuntimeError(f"requests left after {max_steps} steps: {left}")

    def _sample(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One token for each request whose known tokens have all been computed."""
        ids = list(output.num_scheduled_tokens)
        sampled = [[next(self._tokens)] if self._completes(output, i) else [] for i in ids]
        return ModelRunnerOutput(
            ids,
            {r: i for i, r in enumerate(ids)},
            sampled,
            kv_connector_output=self._copy(output.kv_connector_metadata),
        )

    def _copy(self, metadata: Any) -> KVConnectorOutput | None:
        """What the workers would report: the copies that have been under way for long enough."""
        if not isinstance(metadata, SwapMetadata):
            return None
        self.transfers += metadata.transfers
        self._copies.append(metadata.transfers)
        kept = 0 if metadata.flush else self.copy_steps
        ready = [self._copies.popleft() for _ in range(len(self._copies) - kept)]
        workers = self.config.parallel_config.world_size
        done = {t.transfer_id: workers for transfers in ready for t in transfers}
        if not done:
            return None
        return KVConnectorOutput(kv_connector_worker_meta=SwapWorkerMetadata(Report(done=done)))

    def _completes(self, output: SchedulerOutput, request_id: str) -> bool:
        request = self.scheduler.requests.get(request_id)
        if request is None:
            return False
        cached = output.scheduled_cached_reqs
        if request_id in cached.req_ids:
            before = cached.num_computed_tokens[cached.req_ids.index(request_id)]
        else:
            before = next(
                new.num_computed_tokens
                for new in output.scheduled_new_reqs
                if new.req_id == request_id
            )
        return before + output.num_scheduled_tokens[request_id] >= request.num_tokens


def _kv_cache_config(num_blocks: int, block_size: int) -> KVCacheConfig:
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    page = spec.page_size_bytes
    tensor = KVCacheTensor(page * num_blocks, ["layer"], page * num_blocks, page)
    return KVCacheConfig(num_blocks, [tensor], [KVCacheGroupSpec(["layer"], spec)])
