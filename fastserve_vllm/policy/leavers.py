"""Who would leave the device next: the largest ENST first (section 4.2 of the paper)."""

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from operator import neg
from typing import Protocol

from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.queues import ReadyQueue

_SLACK = 64
_QUIET_STEPS = 256

# What has a turn forms a group of its own, with the smallest ENST of all.
_TURN_LEVEL = -1

_Entry = tuple[tuple[float, ...], int, Job, tuple[float, ...], float]


class Forecast(Protocol):
    """When jobs will be scheduled next, as seen at the last decision."""

    @property
    def times(self) -> Sequence[float]:
        """Seconds until a job is executed, by level."""
        ...

    def enst_s(self, job: Job) -> float:
        """Estimated seconds until the job is next scheduled."""
        ...


class Leavers:
    """The paused jobs by priority class and level; finds the largest ENST among them.

    In one class and level all jobs have the same time to execution. So the largest ENST has the
    last of the order, unless that one is promoted before it is executed: then whoever began to
    wait last. Entries of jobs that went elsewhere turn stale and are dropped when they surface.
    """

    def __init__(self, forecast: Forecast, paused: ReadyQueue) -> None:
        self._forecast = forecast
        self._paused = paused
        self._groups: dict[tuple[int, int], tuple[list[_Entry], list[_Entry]]] = {}
        self._numbers = count()
        self._size = 0
        # Nothing is kept while nobody has asked for long.
        self._asked = False
        self._unasked_steps = 0

    def rest(self, steps: int) -> None:
        """Steps have passed in which nobody would ask."""
        self._unasked_steps += steps
        if self._asked and self._unasked_steps > _QUIET_STEPS:
            self._asked = False
            self._groups.clear()

    def push(self, job: Job) -> None:
        """Add a paused job, or follow its change of place."""
        if not self._asked:
            return
        self._size += 1
        if self._size > _SLACK + 2 * len(self._paused):
            self._rebuild()
        self._add(job)

    def largest(self, taken: Collection[Job]) -> Job | None:
        """The paused job with the largest (priority, ENST, key), those `taken` left aside."""
        self._unasked_steps = 0
        if not self._asked:
            self._asked = True
            self._rebuild()
        best: tuple[int, float, tuple[float, ...]] | None = None
        found = None
        enst_s = self._forecast.enst_s
        for (priority, level), (by_key, by_wait) in list(self._groups.items()):
            if best is not None and (priority, self._forecast.times[max(level, 0)]) < best[:2]:
                continue
            last = self._surface(by_key, taken)
            latest = self._surface(by_wait, taken)
            if last is None or latest is None:
                if not by_key:
                    del self._groups[priority, level]
                continue
            job = last if enst_s(last) >= enst_s(latest) else latest
            rank = (priority, enst_s(job), job.key)
            if best is None or rank > best:
                best, found = rank, job
        return found

    def _add(self, job: Job) -> None:
        level = _TURN_LEVEL if job.turn_s is not None else job.level
        by_key, by_wait = self._groups.setdefault((job.priority, level), ([], []))
        rest = (next(self._numbers), job, job.key, job.waiting_since_s)
        heapq.heappush(by_key, (tuple(map(neg, job.key)), *rest))
        heapq.heappush(by_wait, ((-job.waiting_since_s,), *rest))

    def _rebuild(self) -> None:
        self._groups.clear()
        self._size = 0
        for job in self._paused:
            self._size += 1
            self._add(job)

    @staticmethod
    def _surface(heap: list[_Entry], taken: Iterable[Job]) -> Job | None:
        """The heap's first live job; the entries of those taken are dropped like stale ones."""
        while heap:
            _, _, job, key, since_s = heap[0]
            # One that left for good keeps its state, but has no ticket any more.
            live = job.state is JobState.PAUSED and job.ticket is not None and job.key is key
            if live and job.waiting_since_s == since_s and job not in taken:
                return job
            heapq.heappop(heap)
        return None


class Leaving:
    """Iterates over the jobs on the device, the largest ENST first, the waiting before the running.

    Args:
        forecast: knows the ENST of each.
        leavers: the waiting ones, who lose whom this yields until `close`.
        running: the running ones, in order.
    """

    def __init__(self, forecast: Forecast, leavers: Leavers, running: Sequence[Job]) -> None:
        self._forecast = forecast
        self._leavers = leavers
        self._running = list(running)
        self._taken: list[Job] = []
        self._back: list[Job] = []

    def __iter__(self) -> Iterator[Job]:
        return self

    def __next__(self) -> Job:
        if self._back:
            return self._back.pop()
        waiting = self._leavers.largest(self._taken)
        runner = self._running[-1] if self._running else None
        if waiting is not None and (runner is None or self._leaves_before(waiting, runner)):
            self._taken.append(waiting)
            return waiting
        if runner is None:
            raise StopIteration
        return self._running.pop()

    def put_back(self, job: Job) -> None:
        """Yield the job once more."""
        self._back.append(job)

    def close(self) -> None:
        """Give the waiting jobs back."""
        for job in self._taken:
            self._leavers.push(job)

    def _leaves_before(self, waiting: Job, runner: Job) -> bool:
        enst_s = self._forecast.enst_s
        return (waiting.priority, enst_s(waiting)) >= (runner.priority, enst_s(runner))
