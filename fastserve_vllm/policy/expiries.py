"""When running jobs have used up what they may run for."""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from operator import itemgetter

from fastserve_vllm.policy.job import Job

_moment = itemgetter(0)


class Expiries:
    """Running jobs by the reading of the service clock at which they expire.

    A sorted list, for a batch is small: adding and discarding cost O(log B) comparisons.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Job]] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def first_s(self) -> float:
        """The first moment at which one expires; infinite where none does."""
        return self._entries[0][0] if self._entries else math.inf

    def add(self, job: Job, moment_s: float) -> None:
        """The job, which is not there, expires at this moment; infinite: never."""
        job.expiry = (moment_s, job.arrival, job)
        insort(self._entries, job.expiry)

    def discard(self, job: Job) -> None:
        """Take the job out, if it is there."""
        if job.expiry is not None:
            del self._entries[bisect_left(self._entries, job.expiry)]
            job.expiry = None

    def pop_due(self, now_s: float) -> list[Job]:
        """Take out the jobs that expire by now, first one first."""
        if self.first_s > now_s:
            return []
        due = bisect_right(self._entries, now_s, key=_moment)
        expired = [entry[2] for entry in self._entries[:due]]
        del self._entries[:due]
        return expired

    def endless(self) -> Iterator[Job]:
        """The jobs that never expire."""
        for moment_s, _, job in reversed(self._entries):
            if moment_s < math.inf:
                return
            yield job

    def clear(self) -> None:
        """Forget them all."""
        self._entries.clear()
