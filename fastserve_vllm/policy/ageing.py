"""How long a job may wait, and what it gets then."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from fastserve_vllm.policy.job import Job, JobState

_SLACK = 64
# Where an entry of a `DueQueue` has the last part of its rank.
_DUE = -4
# Computing lost KV cache again for the sake of one token may take this share of the time at most.
_RECOMPUTE_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class AbsoluteAgeing:
    """The paper's rule (section 4.1): who has waited for the limit is promoted to level 0.

    Attributes:
        limit_s: seconds of waiting.
    """

    limit_s: float

    def first_due_s(self, base_quantum_s: float) -> float:
        """The shortest patience of any job."""
        return self.limit_s

    def patience_s(self, job: Job, base_quantum_s: float, served_s: float) -> float:
        """Seconds that the job may wait."""
        return self.limit_s

    def raises(self, job: Job) -> bool:
        """Whether the job, which is due, is promoted.

        Not one without KV cache whose first step takes half the limit or longer: on a device too
        small for two such prompts, each would be promoted past the other while that one still
        prefills, and take its memory, for ever. The finite ladder serves them in turn.
        """
        return job.state is not JobState.QUEUED or 2 * job.first_step_s < self.limit_s


@dataclass(frozen=True, slots=True)
class RelativeAgeing:
    """Who has waited long for what it has had gets a turn: the time to compute a token.

    A job whose KV cache is on the device may wait for the gap bound: its turn costs a batch place
    for a step. To serve any other, KV cache has to move or to be computed, and that takes the
    longer the more service it has attained. So it waits for `ratio` times that service (ten
    times its first step where it has to be computed, if that is longer), but no longer than
    `limit_s`: its share of the work stays bounded from below, and the churn from above.

    Attributes:
        ratio: seconds of waiting for a second of service; 0: the gap bound for everybody.
        gap_s: bound of the gap between two tokens, as far as the load allows.
        gap_quanta: the same in base quanta; the longer of the two counts.
        limit_s: longest wait of anybody.
        most_turns: turns at a time, of a priority class and those above it. Beyond that, turns
            come late, longest overdue first.
    """

    ratio: float
    gap_s: float
    limit_s: float
    most_turns: int
    gap_quanta: float = 0.0

    def first_due_s(self, base_quantum_s: float) -> float:
        """The shortest patience of any job: the gap bound."""
        return min(max(self.gap_s, self.gap_quanta * base_quantum_s), self.limit_s)

    def patience_s(self, job: Job, base_quantum_s: float, served_s: float) -> float:
        """Seconds that the job may wait, in the state it is in."""
        gap_s = self.first_due_s(base_quantum_s)
        if job.state in (JobState.PAUSED, JobState.RUNNING):
            return gap_s
        wait_s = self.ratio * served_s
        if job.state is JobState.QUEUED:
            wait_s = max(wait_s, _RECOMPUTE_PATIENCE * job.first_step_s)
        return min(max(wait_s, gap_s), self.limit_s)


Ageing = AbsoluteAgeing | RelativeAgeing


def withdraw(job: Job) -> None:
    """Take the job out of whatever queue it is in."""
    if job.due is not None:
        job.due[-1].discard(job)


class DueQueue:
    """Waiting jobs by rank, such as when they fall due: a heap with lazy deletion.

    Operations cost O(log n) amortized.
    """

    def __init__(self) -> None:
        # (*rank, number, job, queue): flat, for a comparison that follows fewer pointers.
        self._heap: list[tuple[Any, ...]] = []
        self._numbers = count()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, job: Job, *rank: float) -> None:
        """Add the job, or move it; ties go by the order of the calls. It is in no other queue."""
        withdraw(job)
        self._size += 1
        job.due = (*rank, next(self._numbers), job, self)
        heapq.heappush(self._heap, job.due)
        if len(self._heap) > _SLACK + 2 * self._size:
            self._heap = [entry for entry in self._heap if entry[-2].due is entry]
            heapq.heapify(self._heap)

    def discard(self, job: Job) -> None:
        """Remove the job, which is there."""
        self._size -= 1
        job.due = None

    def first(self) -> Job | None:
        """The job with the smallest rank, or None."""
        heap = self._heap
        while heap and heap[0][-2].due is not heap[0]:
            heapq.heappop(heap)
        return heap[0][-2] if heap else None

    @property
    def due_s(self) -> float:
        """When `first()` falls due, the last part of its rank; infinite where there is nobody."""
        return self._heap[0][_DUE] if self.first() is not None else math.inf

    def first_due(self, now_s: float) -> Job | None:
        """`first()`, if it falls due by now. Cheap, for most steps ask for nothing else."""
        # A stale entry that is not due yet hides nobody who is.
        if not self._heap or self._heap[0][_DUE] > now_s:
            return None
        job = self.first()
        return job if job is not None and self._heap[0][_DUE] <= now_s else None

    def next(self, limit: int) -> Sequence[Job]:
        """The jobs with the smallest ranks, in order, `limit` at most."""
        found: list[Job] = []
        self.first()
        frontier = [(self._heap[0], 0)] if self._heap else []
        while frontier and len(found) < limit:
            entry, index = heapq.heappop(frontier)
            if entry[-2].due is entry:
                found.append(entry[-2])
            for child in (2 * index + 1, 2 * index + 2):
                if child < len(self._heap):
                    heapq.heappush(frontier, (self._heap[child], child))
        return found
