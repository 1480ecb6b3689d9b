"""Chooses each step's batch: the first jobs of the total order that the step has room for."""

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.budget import Demand, StepBudget, StepLimits, Verdict
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.queues import ReadyQueue, withdraw

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
    pass over the batch; one whose limits bind costs O(B log n).
    """

    def __init__(self, policy: Policy, demand: Demand) -> None:
        self.policy = policy
        self.demand = demand
        self.counters = StepCounters()
        self._jobs: dict[Job, None] = {}
        self._running: list[Job] = []
        self._queued = ReadyQueue()
        # Queued jobs whose KV cache was loaded onto the device before their first turn.
        self._loaded = ReadyQueue()
        self._paused = ReadyQueue()
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
        return len(self._running) + len(self._paused)

    def state_counts(self) -> dict[JobState, int]:
        """Live jobs by state, in constant time."""
        running, paused = len(self._running), len(self._paused)
        queued = len(self._queued) + len(self._loaded)
        return {
            JobState.BLOCKED: len(self._jobs) - running - queued - paused,
            JobState.QUEUED: queued,
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
        withdraw(job)
        self._requeue(job)

    def missed(self, job: Job, now_s: float) -> None:
        """The host did not run a job of the plan's batch, which was resident before the plan."""
        if job.state is JobState.RUNNING:
            self._running.remove(job)
            self._pause(job, now_s)

    def observe(self, step_s: float, now_s: float) -> None:
        """Charge `step_s` seconds to the running jobs; demote and promote."""
        self._unsorted |= bool(self.policy.charge(step_s))
        for job in self.policy.promote_starved(now_s):
            job.ticket[2].push(job)

    def plan(self, limits: StepLimits, now_s: float) -> StepPlan:
        """Choose the next step's batch and move the jobs to their new states."""
        if self._unsorted:
            self._running.sort(key=_by_key)
            self._unsorted = False
        if not limits.admit_queued:
            return self._drain(limits, now_s)
        joined, left, held = self._take_ready(limits)
        if not limits.hold(self._running, joined):
            candidates = sorted([*self._running, *left], key=_by_key)
            return self._fit(candidates, held, limits, now_s)
        if joined or left or held:
            self.counters.paused += len(left)
            # First to run first: who has waited equally long is promoted in this order.
            outside = [*reversed(left), *held]
            left += [job for job in held if job.state is JobState.RUNNING]
            self._put_back(outside, now_s)
            self._start(joined)
        return StepPlan(tuple(self._running), tuple(joined), tuple(left))

    def check_integrity(self) -> None:
        """Law I1: every live job is in exactly one state, and in the queue that the state means.

        Raises:
            AssertionError: naming the job.
        """
        running, paused = set(self._running), set(self._paused)
        queued = {*self._queued, *self._loaded}
        assert len(running) == len(self._running), "I1: a job runs twice"
        assert len(self._queued) + len(self._loaded) == len(queued), "I1: queued jobs miscounted"
        assert len(self._paused) == len(paused), "I1: the queue of paused jobs miscounts"
        places = {JobState.RUNNING: running, JobState.QUEUED: queued, JobState.PAUSED: paused}
        for job in self._jobs:
            for state, place in places.items():
                assert (job in place) == (job.state is state), f"I1: {job}"
        assert running | queued | paused <= self._jobs.keys(), "I1: a job that left is still here"

    def _queue(self, job: Job, now_s: float) -> None:
        self.policy.join(job, now_s)
        self._requeue(job)

    def _withdraw(self, job: Job) -> None:
        if job.state is JobState.BLOCKED:
            return
        if job.state is JobState.RUNNING:
            self._running.remove(job)
        withdraw(job)
        self.policy.leave(job)

    def _take_ready(self, limits: StepLimits) -> tuple[list[Job], list[Job], list[Job]]:
        """Make `_running` the first jobs of the order that have something to compute.

        Returns:
            The jobs that joined it, the running ones that they displaced, and those held back
            because all that they have to compute is in flight.
        """
        held = self._hold_back(self._running) if limits.overlapping else []
        joined, left = self._take_first(limits.batch_limit)
        newest = joined
        while limits.overlapping and (unready := self._hold_back(newest)):
            held += unready
            gone = set(unready)
            joined = [job for job in joined if job not in gone]
            # There is room again, first of all for the displaced.
            self._running = sorted([*self._running, *left], key=_by_key)
            newest, left = self._take_first(limits.batch_limit)
            joined += newest
        return joined, left, held

    def _hold_back(self, jobs: Sequence[Job]) -> list[Job]:
        """Take those of the running jobs out that have nothing to compute, and return them."""
        unready = self.demand.unready(jobs)
        if unready:
            gone = set(unready)
            self._running = [job for job in self._running if job not in gone]
        return unready

    def _take_first(self, batch_limit: int) -> tuple[list[Job], list[Job]]:
        """Make `_running` the first `batch_limit` jobs of the order.

        Returns:
            The jobs that joined it, and the running ones that they displaced, last one first.
        """
        running = self._running
        joined: list[Job] = []
        left = [running.pop() for _ in range(len(running) - batch_limit)]
        while (head := self._first_waiting()) is not None:
            job, queue = head
            if len(running) >= batch_limit and (not running or job.key >= running[-1].key):
                break
            insort(running, queue.pop(), key=_by_key)
            joined.append(job)
            if len(running) > batch_limit:
                left.append(running.pop())
        return joined, left

    def _first_waiting(self) -> tuple[Job, ReadyQueue] | None:
        """The first of all jobs that wait, and its queue; None: nobody waits."""
        queued, holder = self._queued.first(), self._first_holder()
        if queued is not None and (holder is None or queued.key < holder[0].key):
            return queued, self._queued
        return holder

    def _first_holder(self) -> tuple[Job, ReadyQueue] | None:
        """As `_first_waiting`, among the jobs that hold KV cache."""
        loaded, paused = self._loaded.first(), self._paused.first()
        if loaded is not None and (paused is None or loaded.key < paused.key):
            return loaded, self._loaded
        return None if paused is None else (paused, self._paused)

    def _drain(self, limits: StepLimits, now_s: float) -> StepPlan:
        """Nothing new may start: choose among the jobs that hold KV cache."""
        holders = [*self._paused, *self._loaded]
        for job in holders:
            withdraw(job)
        candidates = sorted([*self._running, *holders], key=_by_key)
        return self._fit(candidates, [], limits, now_s)

    def _fit(
        self, candidates: list[Job], held: list[Job], limits: StepLimits, now_s: float
    ) -> StepPlan:
        """Walk the total order and give each job what is still there.

        Args:
            candidates: jobs taken out of the queues or still running, in order.
            held: jobs taken out that have nothing to compute.
            limits: the room of the step.
            now_s: the time.
        """
        budget = StepBudget(limits, self.demand, lambda: self._holders(candidates, held))
        chosen: list[Job] = []
        passed: list[Job] = []
        lookahead = _LOOKAHEAD * (limits.batch_limit + 1)
        for job in self._in_order(candidates, budget):
            verdict = budget.admit(job)
            (chosen if verdict is Verdict.ADMITTED else passed).append(job)
            lookahead -= verdict is Verdict.DECLINED
            if verdict is Verdict.CLOSED or lookahead == 0:
                break
        taken = {*chosen, *passed}
        passed += [job for job in candidates if job not in taken]
        self._decline(budget.declined)
        return self._regroup(chosen, passed, held, budget, now_s)

    def _holders(self, candidates: list[Job], held: list[Job]) -> Iterator[Job]:
        """The jobs with KV cache on the device, but for those that a walk took from the queues."""
        yield from self._paused
        yield from (job for job in (*candidates, *held) if job.state is not JobState.QUEUED)

    def _in_order(self, candidates: list[Job], budget: StepBudget) -> Iterator[Job]:
        """Merge the candidates with the queues, which lose what is yielded.

        Once the budget takes no queued job, only those with KV cache are worth a look.
        """
        take_queues = budget.limits.admit_queued
        for job in candidates:
            while take_queues and (head := self._first_welcome(budget)) is not None:
                if head[0].key > job.key:
                    break
                yield head[1].pop()
            yield job
        while take_queues and (head := self._first_welcome(budget)) is not None:
            yield head[1].pop()

    def _first_welcome(self, budget: StepBudget) -> tuple[Job, ReadyQueue] | None:
        """As `_first_waiting`, among the jobs that the budget may still admit."""
        if budget.takes_queued:
            return self._first_waiting()
        return self._first_holder()

    def _regroup(
        self,
        chosen: list[Job],
        passed: list[Job],
        held: list[Job],
        budget: StepBudget,
        now_s: float,
    ) -> StepPlan:
        """Give every job of a walk the state that its new place means."""
        victims = budget.victims
        for job in victims:
            self._give_up(job, now_s)
        left = [job for job in (*passed, *held) if job not in victims]
        paused = [job for job in left if job.state is JobState.RUNNING]
        self.counters.paused += len(paused) - sum(job.state is JobState.RUNNING for job in held)
        started = [job for job in chosen if job.state is not JobState.RUNNING]
        self._put_back(left, now_s)
        self._running = chosen.copy()
        self._start(started)
        if budget.partial is not None:
            chosen.remove(budget.partial)
            chosen.append(budget.partial)
        return StepPlan(tuple(chosen), tuple(started), tuple(paused), tuple(victims))

    def _start(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.policy.start(job)
            job.state = JobState.RUNNING
            self.counters.started += 1

    def _put_back(self, jobs: Iterable[Job], now_s: float) -> None:
        """Return jobs that do not run to the queues; a running one is paused."""
        for job in jobs:
            if job.state is JobState.QUEUED:
                self._requeue(job)
            elif job.state is JobState.PAUSED:
                self._paused.push(job)
            else:
                self._pause(job, now_s)

    def _pause(self, job: Job, now_s: float) -> None:
        self.policy.stop(job, now_s)
        job.state = JobState.PAUSED
        self._paused.push(job)

    def _requeue(self, job: Job) -> None:
        job.state = JobState.QUEUED
        (self._loaded if self.demand.holds_kv(job) else self._queued).push(job)

    def _give_up(self, job: Job, now_s: float) -> None:
        if job.state is JobState.RUNNING:
            self.policy.stop(job, now_s)
        withdraw(job)
        # The host still holds its KV cache, but not for long.
        job.state = JobState.QUEUED
        self._queued.push(job)
        self.counters.recomputed += 1

    def _decline(self, reasons: dict[str, int]) -> None:
        for reason, times in reasons.items():
            self.counters.declined[reason] = self.counters.declined.get(reason, 0) + times
