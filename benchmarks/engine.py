"""The real engine in this process, stepped in virtual time."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.records import RequestRecord, digest_of_tokens
from benchmarks.systems import System
from benchmarks.virtual_clock import VirtualClock, use_clock
from benchmarks.workload import Request, prompt_token_ids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import LLM, SamplingParams

# No network, no usage reports; one thread, because two make a small step's time swing widely.
SMALL_MACHINE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
# Virtual time needs the scheduler in the process that owns the clock.
_IN_PROCESS_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
# Asynchronous scheduling decides a step before the last one's tokens exist, which would give
# tokens the time of the step after theirs.
_VIRTUAL_TIME_ARGUMENTS = {
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
    "async_scheduling": False,
}
# Steps without a token before a run counts as stuck.
_MAX_STEPS_WITHOUT_OUTPUT = 100_000


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The engine's size, the same for every system that is compared."""

    model: Path
    batch: int
    kv_blocks: int
    block_size: int = 32
    max_model_len: int = 2048
    max_batched_tokens: int = 2048
    kv_cache_memory_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        # One block is vLLM's null block.
        if (self.kv_blocks - 1) * self.block_size < self.max_model_len:
            raise ValueError(f"{self.kv_blocks} KV blocks cannot hold one longest request")

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
        }


def ample_kv_blocks(requests: Iterable[Request], block_size: int, max_model_len: int) -> int:
    """Blocks with which no request ever waits for KV, even with all of them half done."""
    held = sum(math.ceil((r.prompt_tokens + r.output_tokens) / block_size) for r in requests)
    return max(held, math.ceil(max_model_len / block_size)) + 2


def prepare_environment() -> None:
    """Set the variables that vLLM reads at import; call it before importing vLLM."""
    os.environ.update(SMALL_MACHINE_ENVIRONMENT | _IN_PROCESS_ENVIRONMENT)


@contextmanager
def virtual_engine(shape: EngineShape, system: System) -> Iterator[tuple[LLM, VirtualClock]]:
    """Yield a fresh engine and its clock at 0, and free the engine afterwards.

    Every run gets its own, so that nothing learned or cached in one run reaches the next.
    """
    prepare_environment()
    from vllm import LLM

    clock = VirtualClock()
    use_clock(clock)
    arguments = _VIRTUAL_TIME_ARGUMENTS | shape.arguments() | system.engine_arguments()
    llm = LLM(model=str(shape.model), **arguments)
    try:
        yield llm, clock
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler_of(llm: LLM) -> Any:
    """Return the live scheduler of an in-process engine."""
    client: Any = llm.llm_engine.engine_core
    return client.engine_core.scheduler


@dataclass(slots=True)
class _Progress:
    """What has come out of the engine for one request so far."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)

    def record(self) -> RequestRecord:
        if len(self.token_ids) != self.request.output_tokens:
            raise RuntimeError(
                f"request {self.request.id} produced {len(self.token_ids)} tokens, "
                f"{self.request.output_tokens} were asked for"
            )
        return RequestRecord(
            self.request.id,
            self.request.arrival_s,
            self.request.prompt_tokens,
            self.request.output_tokens,
            tuple(self.token_times_s),
            digest_of_tokens(self.token_ids),
        )


class VirtualRun:
    """Feeds requests to an engine as virtual time reaches their arrival."""

    def __init__(self, llm: LLM, clock: VirtualClock, system: System, prompt_seed: int) -> None:
        tokenizer = llm.get_tokenizer()
        self._engine = llm.llm_engine
        self._clock = clock
        self._system = system
        self._prompt_seed = prompt_seed
        self._vocab_size = len(tokenizer)
        self._special_ids = tuple(tokenizer.all_special_ids)
        self._progress: dict[str, _Progress] = {}

    def run(self, requests: Sequence[Request]) -> list[RequestRecord]:
        """Serve all requests to their end and return their records in order of arrival."""
        pending = sorted(requests, key=lambda request: (request.arrival_s, request.id))[::-1]
        silent_steps = 0
        while pending or self._engine.has_unfinished_requests():
            if not self._engine.has_unfinished_requests():
                self._clock.advance_to(pending[-1].arrival_s)
            while pending and pending[-1].arrival_s <= self._clock():
                self._add(pending.pop())
            silent_steps = 0 if self._step() else silent_steps + 1
            if silent_steps > _MAX_STEPS_WITHOUT_OUTPUT:
                raise RuntimeError("the engine makes no progress")
        return [progress.record() for progress in self._progress.values()]

    def _add(self, request: Request) -> None:
        ids = prompt_token_ids(request, self._prompt_seed, self._vocab_size, self._special_ids)
        self._progress[request.id] = _Progress(request)
        self._engine.add_request(
            request.id,
            {"prompt_token_ids": ids},
            _greedy(request.output_tokens),
            arrival_time=request.arrival_s,
            priority=self._system.priority_of(request),
        )

    def _step(self) -> bool:
        """Run one engine step; return whether any token came out."""
        outputs = self._engine.step()
        now_s = self._clock()
        for output in outputs:
            progress = self._progress[output.request_id]
            completions: Any = output.outputs
            tokens = completions[0].token_ids
            progress.token_ids.extend(tokens)
            progress.token_times_s.extend([now_s] * len(tokens))
        return bool(outputs)


def run_virtual(
    llm: LLM,
    clock: VirtualClock,
    requests: Sequence[Request],
    *,
    system: System,
    prompt_seed: int = 0,
) -> list[RequestRecord]:
    """Serve requests on an engine from `virtual_engine`, in virtual time."""
    return VirtualRun(llm, clock, system, prompt_seed).run(requests)


def _greedy(output_tokens: int) -> SamplingParams:
    """Exactly `output_tokens` greedy tokens, each handed out once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        ignore_eos=True,
        max_tokens=output_tokens,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
