"""Ordered sets of jobs whose keys change rarely: heaps with lazy deletion."""

import heapq
from collections.abc import Iterable, Iterator

from fastserve_vllm.policy.job import Job

_SLACK = 64


class ReadyQueue:
    """Jobs that could take a batch place, first to run first.

    `push` again after a key change; the older entry turns stale and is dropped when it surfaces.
    Push, discard and pop cost O(log n) amortized.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Job]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Job]:
        """The jobs, in no particular order."""
        return (entry[1] for entry in self._heap if entry[1].ticket is entry)

    def push(self, job: Job) -> None:
        """Add the job, or move it to where its key now belongs."""
        self._size += job.ticket is None
        job.ticket = (job.key, job)
        heapq.heappush(self._heap, job.ticket)
        if len(self._heap) > _SLACK + 2 * self._size:
            self._heap = [entry for entry in self._heap if entry[1].ticket is entry]
            heapq.heapify(self._heap)

    def discard(self, job: Job) -> None:
        """Remove the job if it is there."""
        if job.ticket is not None:
            job.ticket = None
            self._size -= 1

    def first(self) -> Job | None:
        """The job that would run first, or None."""
        heap = self._heap
        while heap:
            entry = heap[0]
            if entry[1].ticket is entry:
                return entry[1]
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


class ResidentTail:
    """Jobs that hold KV cache on the device, last to run first: where memory is taken from."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[float, ...], Job]] = []
        self._entry: dict[Job, tuple[tuple[float, ...], Job]] = {}

    def __len__(self) -> int:
        return len(self._entry)

    def __contains__(self, job: Job) -> bool:
        return job in self._entry

    def push(self, job: Job) -> None:
        """Add the job, or move it to where its key now belongs."""
        entry = (tuple(-part for part in job.key), job)
        self._entry[job] = entry
        heapq.heappush(self._heap, entry)
        if len(self._heap) > _SLACK + 2 * len(self._entry):
            self._heap = list(self._entry.values())
            heapq.heapify(self._heap)

    def extend(self, jobs: Iterable[Job]) -> None:
        """Add all of `jobs`."""
        for job in jobs:
            self.push(job)

    def discard(self, job: Job) -> None:
        """Remove the job if it is there."""
        self._entry.pop(job, None)

    def pop(self) -> Job | None:
        """Remove and return the job that would run last, or None."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._entry.get(entry[1]) is entry:
                del self._entry[entry[1]]
                return entry[1]
        return None
