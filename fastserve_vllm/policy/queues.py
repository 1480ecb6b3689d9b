"""An ordered set of jobs whose keys change rarely: a heap with lazy deletion."""

import heapq
from collections.abc import Iterator
from typing import Any

from fastserve_vllm.policy.job import Job

_SLACK = 64


def withdraw(job: Job) -> None:
    """Take the job out of whatever queue it is in."""
    if job.ticket is not None:
        job.ticket[-1].discard(job)


def reposition(job: Job) -> None:
    """Move the job to where its key now belongs in the queue that it is in, if any."""
    if job.ticket is not None:
        job.ticket[-1].push(job)


class ReadyQueue:
    """Jobs that could take a batch place, first to run first.

    `push` again after a key change; the older entry turns stale and is dropped when it surfaces.
    Push, discard and pop cost O(log n) amortized.
    """

    def __init__(self) -> None:
        # (*key, job, queue): flat, for a comparison that follows fewer pointers.
        self._heap: list[tuple[Any, ...]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Job]:
        """The jobs, in no particular order."""
        return (entry[-2] for entry in self._heap if entry[-2].ticket is entry)

    def push(self, job: Job) -> None:
        """Add the job, or move it to where its key now belongs; it is in no other queue."""
        self._size += job.ticket is None
        job.ticket = (*job.key, job, self)
        heapq.heappush(self._heap, job.ticket)
        if len(self._heap) > _SLACK + 2 * self._size:
            self._heap = [entry for entry in self._heap if entry[-2].ticket is entry]
            heapq.heapify(self._heap)

    def discard(self, job: Job) -> None:
        """Remove the job if it is there."""
        if job.ticket is not None and job.ticket[-1] is self:
            job.ticket = None
            self._size -= 1

    def first(self) -> Job | None:
        """The job that would run first, or None."""
        heap = self._heap
        while heap:
            entry = heap[0]
            job: Job = entry[-2]
            if job.ticket is entry:
                return job
            heapq.heappop(heap)
        return None

    def pop(self) -> Job:
        """Remove and return `first()`.

        Raises:
            IndexError: the queue is empty.
        """
        job = self.first()
        if job is None:
            raise IndexError("pop from an empty queue")
        heapq.heappop(self._heap)
        self.discard(job)
        return job
