"""Feeds requests to an engine in this process as time, virtual or wall, reaches their arrival."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.records import RequestRecord, digest_of_tokens
from benchmarks.systems import System
from benchmarks.workload import Request, prompt_token_ids

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

# Steps without a token before a run counts as stuck.
_MAX_SILENT_STEPS = 100_000


class Clock(Protocol):
    """Seconds since the start of the run."""

    def __call__(self) -> float:
        """Read the time."""
        ...

    def advance_to(self, moment_s: float) -> None:
        """Let time pass until a moment."""
        ...


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


@dataclass(frozen=True, slots=True)
class Served:
    """The records of a run, in order of arrival, and the durations of its engine steps."""

    records: list[RequestRecord]
    step_s: list[float]


class Feeder:
    """Serves workloads on one engine, one after the other. Request ids must never repeat."""

    def __init__(self, llm: LLM, system: System, prompt_seed: int) -> None:
        self._engine = llm.llm_engine
        self._system = system
        self._prompt_seed = prompt_seed
        self._vocab_size, self._special_ids = _vocabulary(llm)

    def serve(
        self,
        requests: Sequence[Request],
        clock: Clock,
        watch: Callable[[float], None] | None = None,
    ) -> Served:
        """Serve all requests to their end; `clock` begins at 0.

        `watch` is called with the time at the end of each step.
        """
        run = _Run(self._engine, clock)
        # Prompts and parameters are made beforehand: they are no work of the engine's.
        prepared = [(request, *self._prepare(request)) for request in requests]
        prepared.sort(key=lambda item: (item[0].arrival_s, item[0].id), reverse=True)
        silent_steps = 0
        while prepared or self._engine.has_unfinished_requests():
            if not self._engine.has_unfinished_requests():
                clock.advance_to(prepared[-1][0].arrival_s)
            while prepared and prepared[-1][0].arrival_s <= clock():
                run.add(*prepared.pop())
            silent_steps = 0 if run.step() else silent_steps + 1
            if watch is not None:
                watch(clock())
            if silent_steps > _MAX_SILENT_STEPS:
                raise RuntimeError("the engine makes no progress")
        return Served([progress.record() for progress in run.progress.values()], run.step_s)

    def _prepare(self, request: Request) -> tuple[list[int], SamplingParams, int]:
        ids = prompt_token_ids(request, self._prompt_seed, self._vocab_size, self._special_ids)
        return ids, _greedy(request.output_tokens), self._system.priority_of(request)


class _Run:
    """One workload on its way through the engine."""

    def __init__(self, engine: Any, clock: Clock) -> None:
        self.progress: dict[str, _Progress] = {}
        self.step_s: list[float] = []
        self._engine = engine
        self._clock = clock

    def add(
        self, request: Request, prompt: list[int], params: SamplingParams, priority: int
    ) -> None:
        """Hand a request to the engine."""
        self.progress[request.id] = _Progress(request)
        self._engine.add_request(
            request.id,
            {"prompt_token_ids": prompt},
            params,
            arrival_time=request.arrival_s,
            priority=priority,
        )

    def step(self) -> bool:
        """Run one engine step; return whether any token came out."""
        began_s = self._clock()
        outputs = self._engine.step()
        now_s = self._clock()
        self.step_s.append(now_s - began_s)
        for output in outputs:
            progress = self.progress[output.request_id]
            tokens = output.outputs[0].token_ids
            progress.token_ids.extend(tokens)
            progress.token_times_s.extend([now_s] * len(tokens))
        return bool(outputs)


def _vocabulary(llm: LLM) -> tuple[int, tuple[int, ...]]:
    """How many tokens there are, and which of them are special; a model alone knows of none."""
    model = llm.llm_engine.model_config
    if model.skip_tokenizer_init:
        return model.get_vocab_size(), ()
    tokenizer = llm.get_tokenizer()
    return len(tokenizer), tuple(tokenizer.all_special_ids)


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
