"""The interface of a policy, and the policies that never change a job's place."""

import math
from collections.abc import Sequence
from itertools import count
from typing import Protocol

from fastserve_vllm.policy.job import Job


class Policy(Protocol):
    """Orders jobs through `Job.key`. Every method costs O(log n) in the jobs it knows.

    A method that returns jobs returns those whose key it changed, for the caller to re-queue.
    """

    @property
    def num_levels(self) -> int:
        """How many levels a job can be in."""
        ...

    @property
    def gap_s(self) -> float:
        """Bound that is set to the gap between two tokens of a job; infinite: none."""
        ...

    def join(self, job: Job, now_s: float) -> None:
        """Give an arriving job its level and key. It waits from `now_s` on."""
        ...

    def leave(self, job: Job) -> None:
        """Forget a job that finished, was aborted, or is blocked."""
        ...

    def start(self, job: Job) -> None:
        """The job is in the batch from the next step on."""
        ...

    def stop(self, job: Job, now_s: float) -> None:
        """The job is out of the batch and waits from `now_s` on."""
        ...

    def charge(self, step_s: float) -> Sequence[Job]:
        """A step of `step_s` seconds ended: charge it to the running jobs."""
        ...

    def refresh(self) -> bool:
        """Bring the keys of running jobs up to date, where running changes them.

        The one method that costs O(B). Between two calls the running jobs' keys are comparable
        with one another only.

        Returns:
            Whether keys changed.
        """
        ...

    def key_among_running(self, job: Job) -> tuple[float, ...]:
        """The waiting job's key as it compares with those of running jobs, up to date or not."""
        ...

    def key_among_waiting(self, job: Job) -> tuple[float, ...]:
        """The key of a job, running or not, as it compares with those of waiting jobs."""
        ...

    def promote_starved(self, now_s: float) -> Sequence[Job]:
        """Raise the jobs that have waited for too long."""
        ...

    def calm_s(self, now_s: float) -> float:
        """Seconds in which no job changes its place, if the same ones run on and nobody comes."""
        ...

    def execute_s(self, batch_size: int) -> Sequence[float]:
        """For each level, seconds until all jobs of higher levels have come down to it.

        Args:
            batch_size: jobs that run at a time.
        """
        ...

    def promote_s(self, job: Job, now_s: float) -> float:
        """Seconds until the waiting job has waited for too long; infinite where none is raised."""
        ...

    def next_promoted(self, limit: int) -> Sequence[Job]:
        """The waiting jobs that would be raised first, `limit` at most."""
        ...

    def turn_left_s(self, job: Job) -> float:
        """Seconds of service that the waiting job may attain before it loses its place."""
        ...


class StaticPolicy:
    """A policy whose keys never change: no levels, no quanta, no promotion."""

    num_levels = 1
    gap_s = math.inf

    def __init__(self) -> None:
        self._arrivals = count()

    def key(self, job: Job) -> tuple[float, ...]:
        """The job's place in the total order, fixed at arrival.

        (priority, level, place, unique number), as for policies with levels: who leaves the device
        next is found by priority and level.
        """
        raise NotImplementedError

    def join(self, job: Job, now_s: float) -> None:
        """Number the arrival and fix its key."""
        job.arrival = next(self._arrivals)
        job.waiting_since_s = now_s
        job.key = self.key(job)

    def leave(self, job: Job) -> None:
        """Nothing is kept."""

    def start(self, job: Job) -> None:
        """Nothing is kept."""

    def stop(self, job: Job, now_s: float) -> None:
        """Note since when the job waits."""
        job.waiting_since_s = now_s

    def charge(self, step_s: float) -> Sequence[Job]:
        """Service does not matter."""
        return ()

    def refresh(self) -> bool:
        """Running changes nobody's key."""
        return False

    def key_among_running(self, job: Job) -> tuple[float, ...]:
        """Running changes nobody's key."""
        return job.key

    def key_among_waiting(self, job: Job) -> tuple[float, ...]:
        """Running changes nobody's key."""
        return job.key

    def promote_starved(self, now_s: float) -> Sequence[Job]:
        """Nobody is ever promoted."""
        return ()

    def calm_s(self, now_s: float) -> float:
        """Nobody's place ever changes."""
        return math.inf

    def execute_s(self, batch_size: int) -> Sequence[float]:
        """There are no higher levels to wait for."""
        return (0.0,)

    def promote_s(self, job: Job, now_s: float) -> float:
        """Nobody is ever promoted."""
        return math.inf

    def next_promoted(self, limit: int) -> Sequence[Job]:
        """Nobody is ever promoted."""
        return ()

    def turn_left_s(self, job: Job) -> float:
        """A place is never lost by running."""
        return math.inf


class Fcfs(StaticPolicy):
    """Arrival order within a priority class: every request runs to completion."""

    def key(self, job: Job) -> tuple[float, ...]:
        """(priority, level, arrival), and the arrival once more, as the unique number."""
        return (job.priority, 0, job.arrival, job.arrival)


class FixedPriority(StaticPolicy):
    """Shortest prompt first, the paper's fixed-priority baseline (figure 16)."""

    def key(self, job: Job) -> tuple[float, ...]:
        """(priority, level, prompt tokens, arrival)."""
        return (job.priority, 0, job.prompt_tokens, job.arrival)
