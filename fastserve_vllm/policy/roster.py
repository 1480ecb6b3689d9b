"""The live jobs, each in one state and in the container that the state means."""

from bisect import insort
from collections.abc import Collection, Iterable

from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.job import Job, JobState, by_key
from fastserve_vllm.policy.queues import ReadyQueue, withdraw


class Roster:
    """Holds every live job, and alone changes a job's state.

    A method that changes a state puts the job into its new container; whoever calls it has taken
    the job out of the old one before (`take`), or replaces `running` after. Each costs O(log n).

    Attributes:
        jobs: all live jobs.
        running: those of the batch, in order.
        queued: those that could start, and hold no KV cache on the device.
        loaded: queued ones whose KV cache was loaded onto the device before their first turn.
        paused: those that wait and keep their KV cache on the device.
        swapped: those whose KV cache waits on the host.
        leaving: those on their way to the host, with the device blocks that come free then.
        coming: those on their way back.
    """

    def __init__(self) -> None:
        self.jobs: dict[Job, None] = {}
        self.running: list[Job] = []
        self.queued = ReadyQueue()
        self.loaded = ReadyQueue()
        self.paused = ReadyQueue()
        self.swapped = ReadyQueue()
        self.leaving: dict[Job, int] = {}
        self.coming: dict[Job, None] = {}

    @property
    def all_run(self) -> bool:
        """Whether every live job is in the batch."""
        return len(self.running) == len(self.jobs)

    @property
    def num_residents(self) -> int:
        """Jobs that have a place on the device, in the batch or not."""
        return len(self.running) + len(self.paused) + len(self.leaving) + len(self.coming)

    @property
    def occupied(self) -> bool:
        """Whether any job holds KV cache on the device."""
        return self.num_residents > 0 or len(self.loaded) > 0

    @property
    def leaving_blocks(self) -> int:
        """Device blocks that come free when the copies that are under way end."""
        return sum(self.leaving.values())

    def counts(self) -> dict[JobState, int]:
        """Live jobs by state, in constant time."""
        counts = {
            JobState.QUEUED: len(self.queued) + len(self.loaded),
            JobState.RUNNING: len(self.running),
            JobState.PAUSED: len(self.paused),
            JobState.SWAPPING_OUT: len(self.leaving),
            JobState.SWAPPED: len(self.swapped),
            JobState.SWAPPING_IN: len(self.coming),
        }
        return {JobState.BLOCKED: len(self.jobs) - sum(counts.values()), **counts}

    # ---- a job changes its state ------------------------------------------------------------

    def take(self, job: Job) -> None:
        """Take the job out of the container that it is in."""
        if job.state is JobState.RUNNING:
            self.running.remove(job)
        self.leaving.pop(job, None)
        self.coming.pop(job, None)
        withdraw(job)

    def block(self, job: Job) -> None:
        """It waits for something other than a turn."""
        job.state = JobState.BLOCKED

    def queue(self, job: Job, *, loaded: bool = False) -> None:
        """It waits for a turn, and holds KV cache on the device only if it is `loaded`."""
        job.state = JobState.QUEUED
        (self.loaded if loaded else self.queued).push(job)

    def run(self, job: Job) -> None:
        """It is in the batch: its place in `running` is the caller's business."""
        job.state = JobState.RUNNING
        job.unserved = False

    def pause(self, job: Job) -> None:
        """It waits for a turn and keeps its KV cache on the device."""
        job.state = JobState.PAUSED
        self.paused.push(job)

    def send_out(self, job: Job, blocks: int) -> None:
        """Its KV cache is on its way to the host; so many device blocks come free then."""
        job.state = JobState.SWAPPING_OUT
        self.leaving[job] = blocks

    def swap(self, job: Job) -> None:
        """Its KV cache is on the host."""
        job.state = JobState.SWAPPED
        self.swapped.push(job)

    def bring_in(self, job: Job) -> None:
        """Its KV cache is on its way back."""
        job.state = JobState.SWAPPING_IN
        self.coming[job] = None

    # ---- the batch --------------------------------------------------------------------------

    def reorder(self, moved: Iterable[Job]) -> None:
        """Put those of the jobs that run where their changed keys belong."""
        running = self.running
        moved = [job for job in moved if job.state is JobState.RUNNING]
        for job in moved:
            running.remove(job)
        for job in moved:
            insort(running, job, key=by_key)

    def take_out(self, jobs: Iterable[Job]) -> None:
        """Take several jobs out of `running` at once."""
        gone = set(jobs)
        self.running = [job for job in self.running if job not in gone]

    def refresh(self, policy: Policy) -> None:
        """Bring the running jobs' places up to date."""
        if policy.refresh():
            self.running.sort(key=by_key)

    def fill(self, batch_limit: int, policy: Policy) -> tuple[list[Job], list[Job]]:
        """Make `running` the first `batch_limit` jobs of the order; no job's state changes yet.

        Args:
            batch_limit: jobs in the batch.
            policy: compares those who wait with those who run.

        Returns:
            The jobs that joined it, with keys as among running jobs, and the running ones that
            they displaced, last one first.
        """
        running = self.running
        joined: list[Job] = []
        left = [running.pop() for _ in range(len(running) - batch_limit)]
        while (head := self.first_waiting()) is not None:
            job, queue = head
            key = policy.key_among_running(job)
            if len(running) >= batch_limit and (not running or key >= running[-1].key):
                break
            queue.pop()
            job.key = key
            insort(running, job, key=by_key)
            joined.append(job)
            if len(running) > batch_limit:
                left.append(running.pop())
        return joined, left

    @staticmethod
    def send_back(jobs: Iterable[Job], policy: Policy) -> None:
        """Give jobs that `fill` let join, and that do not run after all, their keys again."""
        for job in jobs:
            if job.state is not JobState.RUNNING:
                job.key = policy.key_among_waiting(job)

    # ---- who waits --------------------------------------------------------------------------

    def first_waiting(self) -> tuple[Job, ReadyQueue] | None:
        """The first of all jobs that may start, and its queue; None: there is none."""
        queued, holder = self.queued.first(), self.first_holder()
        if queued is not None and (holder is None or queued.key < holder[0].key):
            swapped = self.swapped.first()
            # A job without KV cache takes no memory that one on the host ahead of it waits for.
            if swapped is None or queued.key < swapped.key:
                return queued, self.queued
        return holder

    def first_holder(self) -> tuple[Job, ReadyQueue] | None:
        """As `first_waiting`, among the jobs that hold KV cache."""
        loaded, paused = self.loaded.first(), self.paused.first()
        if loaded is not None and (paused is None or loaded.key < paused.key):
            return loaded, self.loaded
        return None if paused is None else (paused, self.paused)

    # ---- the law ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Law I1: every live job is in exactly one state, and in the queue that the state means.

        Raises:
            AssertionError: naming the job.
        """
        running, paused = set(self.running), set(self.paused)
        swapped = set(self.swapped)
        queued = {*self.queued, *self.loaded}
        assert len(running) == len(self.running), "I1: a job runs twice"
        assert len(self.queued) + len(self.loaded) == len(queued), "I1: queued jobs miscounted"
        assert len(self.paused) == len(paused), "I1: the queue of paused jobs miscounts"
        assert len(self.swapped) == len(swapped), "I1: the queue of swapped jobs miscounts"
        places: dict[JobState, Collection[Job]] = {
            JobState.RUNNING: running,
            JobState.QUEUED: queued,
            JobState.PAUSED: paused,
            JobState.SWAPPING_OUT: self.leaving,
            JobState.SWAPPED: swapped,
            JobState.SWAPPING_IN: self.coming,
        }
        for job in self.jobs:
            for state, place in places.items():
                assert (job in place) == (job.state is state), f"I1: {job}"
        here = running | queued | paused | swapped | self.leaving.keys() | self.coming.keys()
        gone = here - self.jobs.keys()
        assert not gone, f"I1: jobs that left are still here: {gone}"
