"""Chooses each step's batch: the first jobs of the total order that the step has room for."""

from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.budget import Demand, StepBudget, StepLimits, Verdict
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.queues import ReadyQueue, ResidentTail

_by_key = attrgetter("key")
# A step's walk ends once this many jobs a batch place were declined: beyond that, the step is
# short of tokens or memory, and looking further would cost more than an idle place.
_LOOKAHEAD = 4


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does; the host applies it.

    Attributes:
        batch: the jobs that run, in the total order. A prefill that gets only what the others
            leave of the token budget comes last.
        started: those of them that were not running before.
        paused: jobs left out that keep their KV cache on the device.
        recomputed: jobs that give up their KV cache, before anything else happens.
    """

    batch: tuple[Job, ...]
    started: tuple[Job, ...] = ()
    paused: tuple[Job, ...] = ()
    recomputed: tuple[Job, ...] = ()


@dataclass(slots=True)
class StepCounters:
    """Arrows taken so far, by name."""

    started: int = 0
    paused: int = 0
    recomputed: int = 0
    finished: int = 0
    declined: dict[str, int] = field(default_factory=dict)


class StepPlanner:
    """The live jobs, their states, and the choice of each step's batch.

    The live scheduler, the simulator and the property tests all drive this object. A step whose
    limits do not bind costs O((c + 1) log n) for the c jobs that enter or leave the batch, and one
    pass over the batch; one whose limits bind costs O((B + s) log n) for the s jobs passed over.
    """

    def __init__(self, policy: Policy, demand: Demand) -> None:
        self.policy = policy
        self.demand = demand
        self.counters = StepCounters()
        self._jobs: dict[Job, None] = {}
        self._running: list[Job] = []
        self._ready = ReadyQueue()
        self._residents = ResidentTail()
        self._unsorted = False

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> Iterable[Job]:
        """All live jobs."""
        return self._jobs.keys()

    @property
    def running(self) -> tuple[Job, ...]:
        """The jobs of the last plan that still run."""
        return tuple(self._running)

    @property
    def num_residents(self) -> int:
        """Jobs that run or are paused."""
        return len(self._residents)

    def state_counts(self) -> dict[JobState, int]:
        """Live jobs by state, in constant time."""
        running, paused = len(self._running), len(self._residents) - len(self._running)
        return {
            JobState.BLOCKED: len(self._jobs) - running - len(self._ready),
            JobState.QUEUED: len(self._ready) - paused,
            JobState.RUNNING: running,
            JobState.PAUSED: paused,
        }

    def add(self, job: Job, now_s: float) -> None:
        """A job arrives, able to run."""
        self._jobs[job] = None
        self._queue(job, now_s)

    def add_blocked(self, job: Job) -> None:
        """A job arrives that cannot run yet; `unblock` lets it join."""
        self._jobs[job] = None
        job.state = JobState.BLOCKED

    def remove(self, job: Job) -> None:
        """A job finished or was aborted, in whatever state."""
        self._withdraw(job)
        del self._jobs[job]
        self.counters.finished += 1

    def block(self, job: Job) -> None:
        """The job waits for something other than a turn."""
        self._withdraw(job)
        job.state = JobState.BLOCKED

    def unblock(self, job: Job, now_s: float) -> None:
        """What the job waited for has come: it joins as on arrival."""
        self._queue(job, now_s)

    def evict(self, job: Job, now_s: float) -> None:
        """The job's KV cache is gone; it keeps its place in the order and starts over."""
        if job.state is JobState.RUNNING:
            self._running.remove(job)
            self.policy.stop(job, now_s)
        self._residents.discard(job)
        job.state = JobState.QUEUED
        self._ready.push(job)

    def missed(self, job: Job, now_s: float) -> None:
        """The host did not run a job of the plan's batch, which was resident before the plan."""
        if job.state is JobState.RUNNING:
            self._running.remove(job)
            self._pause((job,), now_s)

    def observe(self, step_s: float, now_s: float) -> None:
        """Charge `step_s` seconds to the running jobs; demote and promote."""
        for job in self.policy.charge(step_s):
            self._unsorted = True
            self._residents.push(job)
        for job in self.policy.promote_starved(now_s):
            self._ready.push(job)
            if job.state is JobState.PAUSED:
                self._residents.push(job)

    def plan(self, limits: StepLimits, now_s: float) -> StepPlan:
        """Choose the next step's batch and move the jobs to their new states."""
        if self._unsorted:
            self._running.sort(key=_by_key)
            self._unsorted = False
        if not limits.admit_queued:
            return self._drain(limits, now_s)
        if limits.binding:
            return self._fit(self._in_order(self._running, self._ready), limits, now_s)
        joined, left = self._take_first(limits.batch_limit)
        if not limits.hold(self._running):
            self._running += reversed(left)
            return self._fit(self._in_order(self._running, self._ready), limits, now_s)
        if joined or left:
            self.counters.paused += len(left)
            self._pause(left, now_s)
            self._start(joined)
        return StepPlan(tuple(self._running), tuple(joined), tuple(left))

    def check_integrity(self) -> None:
        """Law I1: every live job is in exactly one state, and in the queue that the state means.

        Raises:
            AssertionError: naming the job.
        """
        running, ready = set(self._running), set(self._ready)
        assert len(running) == len(self._running), "I1: a job runs twice"
        assert not running & ready, f"I1: running and ready: {running & ready}"
        for job in self._jobs:
            resident = job.state in (JobState.RUNNING, JobState.PAUSED)
            waits = job.state in (JobState.QUEUED, JobState.PAUSED)
            assert (job in running) == (job.state is JobState.RUNNING), f"I1: {job}"
            assert (job in ready) == waits, f"I1: {job}"
            assert (job in self._residents) == resident, f"I1: {job}"
        assert running | ready <= self._jobs.keys(), "I1: a job that left is still queued"
        assert len(self._ready) == len(ready), "I1: the ready queue miscounts"

    def _queue(self, job: Job, now_s: float) -> None:
        self.policy.join(job, now_s)
        job.state = JobState.QUEUED
        self._ready.push(job)

    def _withdraw(self, job: Job) -> None:
        if job.state is JobState.BLOCKED:
            return
        if job.state is JobState.RUNNING:
            self._running.remove(job)
        self._ready.discard(job)
        self._residents.discard(job)
        self.policy.leave(job)

    def _take_first(self, batch_limit: int) -> tuple[list[Job], list[Job]]:
        """Make `_running` the first `batch_limit` jobs of the order.

        Returns:
            The jobs that joined it, and the running ones that they displaced, last one first.
        """
        running, ready = self._running, self._ready
        joined: list[Job] = []
        left = [running.pop() for _ in range(len(running) - batch_limit)]
        while (job := ready.first()) is not None:
            if len(running) >= batch_limit and (not running or job.key >= running[-1].key):
                break
            insort(running, ready.pop(), key=_by_key)
            joined.append(job)
            if len(running) > batch_limit:
                left.append(running.pop())
        return joined, left

    def _drain(self, limits: StepLimits, now_s: float) -> StepPlan:
        """Nothing new may start: choose among the jobs that hold KV cache."""
        holders = [job for job in self._ready if self.demand.holds_kv(job)]
        for job in holders:
            self._ready.discard(job)
        return self._fit(iter(sorted([*self._running, *holders], key=_by_key)), limits, now_s)

    def _fit(self, in_order: Iterator[Job], limits: StepLimits, now_s: float) -> StepPlan:
        """Walk the total order and give each job what is still there."""
        budget = StepBudget(limits, self.demand, self._residents)
        chosen: list[Job] = []
        passed: dict[Job, None] = {}
        not_ready: set[Job] = set()
        lookahead = _LOOKAHEAD * limits.batch_limit + _LOOKAHEAD
        for job in in_order:
            verdict = budget.admit(job)
            if verdict is Verdict.ADMITTED:
                chosen.append(job)
                continue
            passed[job] = None
            if verdict is Verdict.NOT_READY:
                not_ready.add(job)
                continue
            lookahead -= 1
            if verdict is Verdict.CLOSED or lookahead == 0:
                break
        placed = set(chosen)
        passed.update((job, None) for job in self._running if job not in placed)
        if not limits.admit_queued:
            passed.update((job, None) for job in in_order)
        self._residents.extend(budget.spared)
        self._decline(budget.declined)
        plan = self._regroup(chosen, passed, budget, now_s)
        self.counters.paused += sum(job not in not_ready for job in plan.paused)
        return plan

    def _regroup(
        self, chosen: list[Job], passed: Iterable[Job], budget: StepBudget, now_s: float
    ) -> StepPlan:
        """Give every job of a walk the state that its new place means."""
        victims = budget.victims
        for job in victims:
            self._give_up(job, now_s)
        started = [job for job in chosen if job.state is not JobState.RUNNING]
        paused = [job for job in passed if job.state is JobState.RUNNING]
        for job in passed:
            if job.state is not JobState.RUNNING and job not in victims:
                self._ready.push(job)
        self._running = chosen.copy()
        self._pause(paused, now_s)
        self._start(started)
        if budget.partial is not None:
            chosen.remove(budget.partial)
            chosen.append(budget.partial)
        return StepPlan(tuple(chosen), tuple(started), tuple(paused), tuple(victims))

    @staticmethod
    def _in_order(running: Iterable[Job], ready: ReadyQueue) -> Iterator[Job]:
        """Merge the sorted running jobs with the ready queue, which loses what is yielded."""
        for job in running:
            while (first := ready.first()) is not None and first.key < job.key:
                yield ready.pop()
            yield job
        while ready.first() is not None:
            yield ready.pop()

    def _start(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.policy.start(job)
            self._residents.push(job)
            job.state = JobState.RUNNING
            self.counters.started += 1

    def _pause(self, jobs: Iterable[Job], now_s: float) -> None:
        for job in jobs:
            self.policy.stop(job, now_s)
            job.state = JobState.PAUSED
            self._ready.push(job)

    def _give_up(self, job: Job, now_s: float) -> None:
        if job.state is JobState.RUNNING:
            self.policy.stop(job, now_s)
        job.state = JobState.QUEUED
        self._ready.push(job)
        self.counters.recomputed += 1

    def _decline(self, reasons: dict[str, int]) -> None:
        for reason, times in reasons.items():
            self.counters.declined[reason] = self.counters.declined.get(reason, 0) + times
