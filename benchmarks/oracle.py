"""Shortest remaining processing time with true lengths: a bound that nobody can have in practice.

Kept out of the package, so that no policy of the product can read a true output length. With
end-of-sequence ignored, a request's `max_tokens` is its true output length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.alone import VIRTUAL
from fastserve_vllm.policy.base import StaticPolicy
from fastserve_vllm.policy.job import Job


class SrptOracle(StaticPolicy):
    """Orders jobs by the seconds of work that are truly left.

    Args:
        left: prompt tokens and output tokens of a job that are still to be computed.
        first_tokens: who has not been prefilled goes before everybody else, in order of arrival.
    """

    def __init__(
        self, left: Callable[[Job], tuple[int, int]], *, first_tokens: bool = False
    ) -> None:
        super().__init__()
        self._left = left
        self._first_tokens = first_tokens
        self._running: dict[Job, None] = {}

    def key(self, job: Job) -> tuple[float, ...]:
        """(priority, whether it has been prefilled, seconds of work left, arrival)."""
        prompt_left, output_left = self._left(job)
        if self._first_tokens and prompt_left:
            return (job.priority, 0, 0.0, job.arrival)
        return (job.priority, 1, VIRTUAL(prompt_left, output_left), job.arrival)

    def start(self, job: Job) -> None:
        """Its remaining work shrinks from now on."""
        self._running[job] = None

    def stop(self, job: Job, now_s: float) -> None:
        """Its remaining work stands still."""
        super().stop(job, now_s)
        del self._running[job]

    def leave(self, job: Job) -> None:
        """Forget the job."""
        self._running.pop(job, None)

    def charge(self, step_s: float) -> Sequence[Job]:
        """The running jobs come closer to their ends."""
        for job in self._running:
            job.key = self.key(job)
        return tuple(self._running)


def left_in_engine(job: Job) -> tuple[int, int]:
    """What is left of a request of vLLM's."""
    request = job.handle
    prompt_left = max(request.num_prompt_tokens - request.num_computed_tokens, 0)
    return prompt_left, request.max_tokens - request.num_output_tokens


def left_in_simulation(job: Job) -> tuple[int, int]:
    """What is left of a simulated request."""
    live = job.handle
    prompt_left = max(live.request.prompt_tokens - live.computed, 0)
    return prompt_left, live.request.output_tokens - live.generated


def install(scheduler: Any) -> None:
    """Give a FastServe scheduler that has no requests yet the oracle for its policy."""
    planner = scheduler.planner
    planner.policy = SrptOracle(left_in_engine)
    if getattr(planner, "ahead", None) is not None:
        planner.ahead.policy = planner.policy
