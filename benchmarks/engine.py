"""The engine that is measured: its size, its environment, and how it is built in this process."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.errors import InputError
from benchmarks.workload import Request, TraceRow

if TYPE_CHECKING:
    from vllm import LLM

# No network, no usage reports; one thread, because two make a small step's time swing widely; huge
# pages for KV cache, as scripts/cpu_env.sh says.
SMALL_MACHINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
# The scheduler has to be in the process that owns the clock.
_IN_PROCESS_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
_IN_PROCESS_ARGUMENTS = {"disable_log_stats": True, "use_tqdm_on_load": False}
# Asynchronous scheduling decides a step before the last one's tokens exist, which would give
# tokens the virtual time of the step after theirs.
VIRTUAL_ARGUMENTS = {"async_scheduling": False}


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The engine's size, the same for every system that is compared.

    `further` are engine arguments which replace the ones given here; `pace`, over HTTP, is how many
    times as long as on the virtual clock steps are to last, None: as long as they take. Raises
    InputError for KV blocks that cannot hold one longest request.
    """

    model: Path
    batch: int
    kv_blocks: int
    block_size: int = 32
    max_model_len: int = 2048
    max_batched_tokens: int = 2048
    kv_cache_memory_bytes: int = 1 << 28
    further: Mapping[str, Any] = field(default_factory=dict)
    pace: float | None = None

    def __post_init__(self) -> None:
        if self.kv_blocks < fewest_kv_blocks(self.block_size, self.max_model_len):
            raise InputError(f"{self.kv_blocks} KV blocks cannot hold one longest request")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `vllm.LLM`, without the model."""
        return {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.batch,
            "max_num_batched_tokens": self.max_batched_tokens,
            "block_size": self.block_size,
            "num_gpu_blocks_override": self.kv_blocks,
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            **self.further,
        }


def fewest_kv_blocks(block_size: int, max_model_len: int) -> int:
    """Blocks that one longest request needs, and vLLM's null block."""
    return math.ceil(max_model_len / block_size) + 1


def blocks_at_full_length(request: Request | TraceRow, block_size: int) -> int:
    """KV blocks that a request holds when its last token is there."""
    return math.ceil((request.prompt_tokens + request.output_tokens) / block_size)


def prepare_environment() -> None:
    """Set the variables that vLLM reads at import; call it before importing vLLM."""
    os.environ.update(SMALL_MACHINE_ENVIRONMENT | _IN_PROCESS_ENVIRONMENT)


@contextmanager
def in_process_engine(shape: EngineShape, arguments: Mapping[str, Any]) -> Iterator[LLM]:
    """Yield a fresh engine in this process, and free it afterwards."""
    prepare_environment()
    from vllm import LLM

    merged = _IN_PROCESS_ARGUMENTS | shape.arguments() | dict(arguments)
    llm = LLM(model=str(shape.model), **merged)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler_of(llm: LLM) -> Any:
    """Return the live scheduler of an in-process engine."""
    client: Any = llm.llm_engine.engine_core
    return client.engine_core.scheduler
