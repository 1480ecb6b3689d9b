"""The contract with vLLM: all that FastServe touches, in one table, checked at start-up."""

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from packaging.version import InvalidVersion, Version

SUPPORTED = ((0, 32), (0, 34))
"""vLLM's minor versions from the first up to, not including, the second."""


class HostContractError(RuntimeError):
    """The installed vLLM is not one that this FastServe can drive; the message says why."""


@dataclass(frozen=True, slots=True)
class Seam:
    """One thing of vLLM's that FastServe relies on.

    Attributes:
        path: "module:Class.member".
        parameters: names that a function's signature must have, in this order, first.
        sets: names of attributes that the class's `__init__` must set.
        why: what FastServe does with it.
    """

    path: str
    why: str
    parameters: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()

    def violations(self) -> Iterator[str]:
        """What about the seam is not as expected; nothing when all is well."""
        try:
            target = _resolve(self.path)
        except (ImportError, AttributeError) as error:
            yield f"{self.path} is missing ({error}); needed to {self.why}"
            return
        if self.parameters:
            found = tuple(inspect.signature(target).parameters)
            if found[: len(self.parameters)] != self.parameters:
                yield (
                    f"{self.path} takes {found}, expected it to begin with {self.parameters}; "
                    f"needed to {self.why}"
                )
        written = set(_written_by_init(target)) if self.sets else set()
        for name in self.sets:
            if name not in written:
                yield f"{self.path} does not set {name}; needed to {self.why}"


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_KV = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_KV_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
_CONNECTOR = f"{_KV_CONNECTOR}.v1.base:KVConnectorBase_V1"
_OUTPUT = "vllm.v1.core.sched.output"
_KV_CACHE = "vllm.v1.kv_cache_interface"
_COPIES = "vllm.v1.simple_kv_offload.cuda_mem_ops"

CONTRACT: tuple[Seam, ...] = (
    Seam("vllm.v1.core.sched.async_scheduler:AsyncScheduler", "inherit the iteration scheduler"),
    Seam(f"{_SCHEDULER}.schedule", "run a planned step", ("self", "throttle_prefills")),
    Seam(
        f"{_SCHEDULER}.update_from_output",
        "time a step",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    Seam(
        f"{_SCHEDULER}._enqueue_waiting_request",
        "take in arrivals and sessions that wait for input",
        ("self", "request"),
    ),
    Seam(
        f"{_SCHEDULER}._preempt_request",
        "give up a request's KV cache",
        ("self", "request", "timestamp", "drop_stale_output"),
    ),
    Seam(
        f"{_SCHEDULER}._update_after_schedule",
        "leave asynchronous bookkeeping out where it is off",
        ("self", "scheduler_output"),
    ),
    Seam(
        f"{_SCHEDULER}._update_request_with_output",
        "leave asynchronous bookkeeping out where it is off",
        ("self", "request", "new_token_ids", "is_stale"),
    ),
    Seam(f"{_SCHEDULER}._free_request", "forget finished requests", ("self", "request")),
    Seam(
        f"{_SCHEDULER}._handle_blocked_waiting_request",
        "ask whether a grammar, remote KV or input has come",
        ("self", "request"),
    ),
    Seam(
        f"{_SCHEDULER}._request_blocks_can_be_freed",
        "leave the KV cache of steps in flight alone",
        ("self", "request"),
    ),
    Seam(
        f"{_SCHEDULER}._request_remaining_blocks",
        "count the blocks that a request still needs",
        ("self", "request"),
    ),
    Seam(
        f"{_SCHEDULER}._is_blocked_waiting_status",
        "tell requests that cannot run yet",
        ("status",),
    ),
    Seam(f"{_SCHEDULER}.get_request_counts", "count paused requests as running", ("self",)),
    Seam(
        f"{_SCHEDULER}.reset_prefix_cache",
        "hand paused requests back before a reset",
        ("self", "reset_running_requests", "reset_connector"),
    ),
    Seam(f"{_SCHEDULER}.shutdown", "save the step-time profile", ("self",)),
    Seam(
        _SCHEDULER,
        "read and narrow the scheduler's state",
        sets=(
            "running",
            "waiting",
            "kv_holding_waiting",
            "requests",
            "connector",
            "vllm_config",
            "lora_config",
            "kv_cache_config",
            "kv_cache_manager",
            "kv_cache_config",
            "block_size",
            "use_v2_model_runner",
            "max_num_active_reqs",
            "max_num_running_reqs",
            "max_num_scheduled_tokens",
            "num_waiting_for_streaming_input",
            "num_spec_tokens",
            "scheduler_config",
            "current_step",
            "_pause_state",
            "finished_recving_kv_req_ids",
            "failed_recving_kv_req_ids",
        ),
    ),
    Seam(
        "vllm.v1.request:Request",
        "read a request's progress",
        sets=(
            "request_id",
            "priority",
            "status",
            "lora_request",
            "max_tokens",
            "num_prompt_tokens",
            "num_computed_tokens",
            "num_in_flight_tokens",
            "num_output_placeholders",
            "num_stale_output_tokens",
            "drop_stale_output",
            "next_decode_eligible_step",
            "is_prefill_chunk",
        ),
    ),
    Seam("vllm.v1.request:Request.num_tokens", "read a request's length"),
    Seam("vllm.v1.request:Request.num_tokens_with_spec", "read a request's length"),
    Seam("vllm.v1.request:Request", "name the content of blocks", sets=("block_hashes",)),
    Seam("vllm.v1.request:RequestStatus.PREEMPTED", "tell requests that came back from the host"),
    Seam(
        "vllm.v1.request:RequestStatus.WAITING_FOR_REMOTE_KVS",
        "let a request wait for its KV cache",
    ),
    Seam("vllm.v1.request:RequestStatus.RUNNING", "tell requests that hold KV cache"),
    Seam("vllm.v1.core.sched.interface:PauseState.PAUSED_ALL", "leave a paused engine alone"),
    Seam("vllm.v1.core.sched.interface:PauseState.UNPAUSED", "start no requests while pausing"),
    Seam(
        f"{_OUTPUT}:SchedulerOutput",
        "learn what a step computes",
        sets=("num_scheduled_tokens", "total_num_scheduled_tokens", "scheduled_cached_reqs"),
    ),
    Seam(f"{_OUTPUT}:CachedRequestData", "size up a step", sets=("num_computed_tokens",)),
    Seam(
        "vllm.v1.core.sched.request_queue:RequestQueue.prepend_requests",
        "replace the waiting queues",
        ("self", "requests"),
    ),
    Seam(f"{_KV}.get_computed_blocks", "find a prompt's cached prefix", ("self", "request")),
    Seam(f"{_KV}.get_blocks", "count the blocks that a preemption frees", ("self", "request_id")),
    Seam(_KV, "count free blocks", sets=("block_pool", "watermark_blocks", "enable_caching")),
    Seam(f"{_KV}.get_block_ids", "copy a request's blocks", ("self", "request_id")),
    Seam(f"{_KV}.free", "free the blocks of a request that came back", ("self", "request")),
    Seam(
        f"{_KV}.allocate_slots",
        "allocate blocks to a request that comes back",
        (
            "self",
            "request",
            "num_new_tokens",
            "num_new_computed_tokens",
            "new_computed_blocks",
            "num_lookahead_tokens",
            "num_external_computed_tokens",
            "delay_cache_blocks",
        ),
    ),
    Seam("vllm.v1.core.block_pool:BlockPool", "leave the null block alone", sets=("null_block",)),
    Seam("vllm.config:ParallelConfig.world_size", "count the workers that report a copy"),
    Seam(
        "vllm.v1.outputs:KVConnectorOutput",
        "hand finished copies over",
        sets=(
            "finished_sending",
            "finished_recving",
            "kv_connector_worker_meta",
            "invalid_block_ids",
        ),
    ),
    Seam(
        "vllm.v1.outputs:ModelRunnerOutput",
        "take in what the workers copied",
        sets=("kv_connector_output",),
    ),
    Seam(
        f"{_CONNECTOR}.get_num_new_matched_tokens",
        "bring KV cache back in the step that needs it",
        ("self", "request", "num_computed_tokens"),
    ),
    Seam(
        f"{_CONNECTOR}.update_state_after_alloc",
        "bring KV cache back in the step that needs it",
        ("self", "request", "blocks", "num_external_tokens"),
    ),
    Seam(
        f"{_CONNECTOR}.request_finished",
        "keep blocks until their copy was reported",
        ("self", "request", "block_ids"),
    ),
    Seam(
        f"{_CONNECTOR}.register_kv_caches",
        "find the device's blocks",
        ("self", "kv_caches"),
    ),
    Seam(
        f"{_CONNECTOR}.handle_preemptions",
        "copy blocks before they are written again",
        ("self", "kv_connector_metadata"),
    ),
    Seam(
        f"{_CONNECTOR}.start_load_kv",
        "start copies",
        ("self", "forward_context"),
    ),
    Seam(
        f"{_CONNECTOR}.get_block_ids_with_load_errors",
        "tell of blocks that could not be filled",
        ("self",),
    ),
    Seam(
        f"{_CONNECTOR}.build_connector_worker_meta",
        "report copies",
        ("self",),
    ),
    Seam(
        f"{_CONNECTOR}.update_connector_output",
        "take in what the workers copied",
        ("self", "connector_output"),
    ),
    Seam(
        f"{_CONNECTOR}.build_connector_meta",
        "tell the workers what to copy",
        ("self", "scheduler_output"),
    ),
    Seam(
        "vllm.config:KVTransferConfig.kv_load_failure_policy",
        "compute again what could not be copied",
    ),
    Seam("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", "count free blocks", ("self",)),
    Seam("vllm.v1.core.kv_cache_utils:KVCacheBlock.ref_cnt", "count shared blocks"),
    Seam("vllm.v1.core.kv_cache_utils:KVCacheBlock.is_null", "count shared blocks"),
    Seam("vllm.v1.core.kv_cache_manager:KVCacheBlocks", "count blocks", sets=("blocks",)),
    Seam("vllm.v1.kv_cache_interface:KVCacheConfig", "describe itself", sets=("num_blocks",)),
    Seam("vllm.config:VllmConfig.max_concurrent_batches", "tell whether steps overlap"),
    Seam("vllm.config:SchedulerConfig.enable_chunked_prefill", "fill the token budget"),
    Seam("vllm.config:SchedulerConfig.long_prefill_token_threshold", "fill the token budget"),
    Seam("vllm.config:LoRAConfig.max_loras", "keep to the adapters that fit a step"),
    Seam("vllm.lora.request:LoRARequest.lora_int_id", "keep to the adapters that fit a step"),
    Seam(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args", "declare command-line flags", ("parser",)
    ),
    Seam("vllm.engine.arg_utils:EngineArgs.from_cli_args", "read command-line flags", ("args",)),
    Seam(_CONNECTOR, "read FastServe's configuration", sets=("_kv_transfer_config",)),
    Seam(f"{_CONNECTOR}.get_kv_connector_stats", "export figures", ("self",)),
    Seam(f"{_CONNECTOR}.build_kv_connector_stats", "export figures", ("data",)),
    Seam(
        f"{_CONNECTOR}.build_prom_metrics",
        "export figures",
        ("vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    ),
    Seam(f"{_KV_CONNECTOR}.v1.metrics:KVConnectorStats", "export figures", sets=("data",)),
    Seam(
        f"{_KV_CONNECTOR}.v1.metrics:KVConnectorPromMetrics",
        "export figures",
        sets=("per_engine_labelvalues",),
    ),
    Seam(f"{_CONNECTOR}.requires_kv_delivery", "keep preempted requests' output"),
    Seam(
        f"{_KV_CONNECTOR}.v1.multi_connector:MultiConnector.sub_connectors",
        "live beside a user's own connector",
    ),
    Seam(
        f"{_KV_CONNECTOR}.factory:KVConnectorFactory.register_connector",
        "export figures beside a user's own connector",
        ("name", "module_path", "class_name"),
    ),
    Seam(f"{_KV_CONNECTOR}.v1.base:KVConnectorMetadata", "tell workers what to copy"),
    Seam(
        f"{_KV_CONNECTOR}.v1.base:KVConnectorWorkerMetadata.aggregate",
        "hear from workers what they copied",
        ("self", "other"),
    ),
    Seam(
        f"{_KV_CACHE}:KVCacheConfig",
        "find a block's bytes",
        sets=("num_blocks", "kv_cache_tensors", "kv_cache_groups"),
    ),
    Seam(
        f"{_KV_CACHE}:KVCacheTensor",
        "find a block's bytes",
        sets=("size", "layers", "layer_stride", "block_stride", "offset"),
    ),
    Seam(
        f"{_KV_CACHE}:KVCacheGroupSpec",
        "refuse KV cache that cannot be swapped",
        sets=("layer_names", "kv_cache_spec", "host_resident", "enable_kv_transfer"),
    ),
    Seam(
        f"{_KV_CACHE}:KVCacheConfig.needs_kv_cache_zeroing",
        "refuse KV cache that cannot be swapped",
    ),
    Seam(
        f"{_KV_CACHE}:KVCacheSpec.prefix_cacheable",
        "refuse KV cache that cannot be swapped",
    ),
    Seam(
        f"{_KV_CACHE}:iter_layer_specs",
        "refuse KV cache that cannot be swapped",
        ("kv_cache_spec",),
    ),
    Seam(f"{_KV_CACHE}:FullAttentionSpec", "swap full attention"),
    Seam(f"{_KV_CACHE}:MLAAttentionSpec", "swap latent attention"),
    Seam(f"{_KV_CACHE}:SlidingWindowSpec", "swap sliding windows"),
    Seam(f"{_KV_CACHE}:SlidingWindowMLASpec", "swap sliding windows"),
    Seam(f"{_KV_CACHE}:ChunkedLocalAttentionSpec", "swap chunked attention"),
    Seam(
        "vllm.distributed.utils:get_pp_indices",
        "size host memory alike on all pipeline stages",
        ("num_hidden_layers", "pp_rank", "pp_size"),
    ),
    Seam(
        "vllm.config:ModelConfig.get_total_num_hidden_layers",
        "size host memory alike on all pipeline stages",
        ("self",),
    ),
    Seam("vllm.config:ParallelConfig.rank", "size host memory alike on all pipeline stages"),
    Seam(
        "vllm.config:ParallelConfig.tensor_parallel_size",
        "size host memory alike on all pipeline stages",
    ),
    Seam(
        "vllm.config:ParallelConfig.pipeline_parallel_size",
        "size host memory alike on all pipeline stages",
    ),
    Seam(
        "vllm.distributed.parallel_state:get_pp_group",
        "size host memory alike on all pipeline stages",
    ),
    Seam(
        "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object",
        "size host memory alike on all pipeline stages",
        ("self", "obj", "src"),
    ),
    Seam("vllm.utils.platform_utils:is_pin_memory_available", "pin host memory"),
    Seam(f"{_COPIES}:pin_tensor", "pin host memory", ("tensor",)),
    Seam(
        f"{_COPIES}:build_params",
        "copy blocks on a side stream",
        ("src_caches", "dst_caches", "stream", "src_access_order"),
    ),
    Seam(
        f"{_COPIES}:copy_blocks",
        "copy blocks on a side stream",
        ("src_block_ids", "dst_block_ids", "params"),
    ),
    Seam(f"{_COPIES}:CU_MEMCPY_SRC_ACCESS_ORDER_STREAM", "copy blocks on a side stream"),
)


def check(contract: tuple[Seam, ...] = CONTRACT) -> None:
    """Compare the installed vLLM with the contract.

    Raises:
        HostContractError: listing the version or every seam that does not fit.
    """
    import vllm

    low, high = SUPPORTED
    if not low <= _release(vllm.__version__) < high:
        raise HostContractError(
            f"this FastServe supports vLLM >={low[0]}.{low[1]},<{high[0]}.{high[1]}; "
            f"{vllm.__version__} is installed"
        )
    violations = [text for seam in contract for text in seam.violations()]
    if violations:
        raise HostContractError(
            f"vLLM {vllm.__version__} is not as FastServe expects:\n- " + "\n- ".join(violations)
        )


def _release(version: str) -> tuple[int, ...]:
    """(major, minor); () for a version that is none, as in a source tree without metadata."""
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return ()


def _resolve(path: str) -> Any:
    module, _, names = path.partition(":")
    target: Any = import_module(module)
    for name in names.split("."):
        target = getattr(target, name)
    return target


def _written_by_init(cls: type[Any]) -> Iterator[str]:
    """Names of the attributes that the class's `__init__` assigns; none where it is compiled."""
    if not inspect.isfunction(cls.__init__):
        return
    for instruction in dis.get_instructions(cls.__init__):
        if instruction.opname == "STORE_ATTR":
            yield instruction.argval
