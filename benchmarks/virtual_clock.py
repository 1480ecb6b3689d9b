"""Virtual time: the engine really steps, but a fixed model says how long each step took.

Scheduling figures are then free of noise and the same on every machine. `meter` applies it to a
live scheduler; nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# Seconds of a step of a tiny model on one CPU core: per step, per prefill token, per decode.
STEP_BASE_SECONDS = 0.0014
PREFILL_TOKEN_SECONDS = 21e-6
DECODE_SECONDS = 30e-6


class VirtualClock:
    """A clock that moves only when told to. Calling it reads the time in seconds."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def __call__(self) -> float:
        """Read the time."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward. Raises ValueError for a negative step."""
        if not seconds >= 0:
            raise ValueError(f"a clock cannot advance by {seconds} s")
        self._now_s += seconds

    def advance_to(self, moment_s: float) -> None:
        """Move forward to a moment; a moment in the past changes nothing."""
        self._now_s = max(self._now_s, moment_s)


class NewRequestView(Protocol):
    """What is read of vLLM's `NewRequestData`."""

    req_id: str
    prompt_token_ids: Sequence[int] | None
    num_computed_tokens: int


class StepView(Protocol):
    """What is read of vLLM's `SchedulerOutput`."""

    scheduled_new_reqs: Sequence[NewRequestView]
    num_scheduled_tokens: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class StepShape:
    """The work in one engine step."""

    prefill_tokens: int
    decodes: int

    @property
    def seconds(self) -> float:
        """Duration of the step; a step without work still costs its base."""
        prefill_s = PREFILL_TOKEN_SECONDS * self.prefill_tokens
        return STEP_BASE_SECONDS + prefill_s + DECODE_SECONDS * self.decodes


def step_shape(step: StepView) -> StepShape:
    """Split a step into prefill tokens and decodes.

    A request with exactly one scheduled token decodes, unless it still computes its prompt in
    its first step: a prompt of one token, or one whose other tokens came from a cache.
    """
    starting = {new.req_id for new in step.scheduled_new_reqs if _computes_prompt(new)}
    prefill_tokens = decodes = 0
    for request_id, tokens in step.num_scheduled_tokens.items():
        if tokens == 1 and request_id not in starting:
            decodes += 1
        else:
            prefill_tokens += tokens
    return StepShape(prefill_tokens, decodes)


def _computes_prompt(new: NewRequestView) -> bool:
    return new.num_computed_tokens < len(new.prompt_token_ids or ())
