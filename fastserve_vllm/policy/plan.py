"""Chooses each step's batch: the first jobs of the total order that the step has room for."""

from bisect import insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.budget import Demand, StepBudget, StepLimits, Verdict
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.queues import ReadyQueue, reposition, withdraw
from fastserve_vllm.policy.swap import Room, SwapDemand, SwapPlanner, worth_copying

_by_key = attrgetter("key")
# A step's walk ends once this many jobs a batch place were declined: beyond that, the step is
# short of tokens or memory, and looking further would cost more than an idle place.
_LOOKAHEAD = 4


class StepPlan(NamedTuple):
    """What one step does; the host applies it.

    Attributes:
        batch: the jobs that run, in the total order. A prefill that gets only what the others
            leave of the token budget comes last.
        started: those of them that were not running before.
        paused: jobs left out that keep their KV cache on the device.
        recomputed: jobs that give up their KV cache, before anything else happens.
        spilled: jobs whose device blocks are taken at once, and whose KV cache goes to the host
            before the step computes: the step waits for the copy.
        swapped_out: jobs whose KV cache is copied to the host while others run.
        swapped_in: jobs whose KV cache is copied back likewise.
        saved: jobs that stay, and whose full blocks are copied to the host in advance.
    """

    batch: tuple[Job, ...]
    started: tuple[Job, ...] = ()
    paused: tuple[Job, ...] = ()
    recomputed: tuple[Job, ...] = ()
    spilled: tuple[Job, ...] = ()
    swapped_out: tuple[Job, ...] = ()
    swapped_in: tuple[Job, ...] = ()
    saved: tuple[Job, ...] = ()


@dataclass(slots=True)
class StepCounters:
    """Arrows taken so far, by name."""

    started: int = 0
    paused: int = 0
    recomputed: int = 0
    spilled: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    saved: int = 0
    finished: int = 0
    declined: dict[str, int] = field(default_factory=dict)


class StepPlanner:
    """The live jobs, their states, and the choice of each step's batch.

    The live scheduler, the simulator and the property tests all drive this object. A step whose
    limits do not bind costs O((c + 1) log n) for the c jobs that enter or leave the batch, and one
    pass over the batch; one whose limits bind costs O(B log n).

    Args:
        policy: orders the jobs.
        demand: the host's answers.
        swap: the host's answers on KV swap; None: KV cache given up is computed again.
        device_blocks: blocks of the device, where KV cache moves ahead of need; None: only when a
            job that runs now needs the room, or its own KV cache.
    """

    def __init__(
        self,
        policy: Policy,
        demand: Demand,
        swap: SwapDemand | None = None,
        device_blocks: int | None = None,
    ) -> None:
        self.policy = policy
        self.demand = demand
        self.swap = swap
        self.counters = StepCounters()
        self._jobs: dict[Job, None] = {}
        self._running: list[Job] = []
        self._queued = ReadyQueue()
        # Queued jobs whose KV cache was loaded onto the device before their first turn.
        self._loaded = ReadyQueue()
        self._paused = ReadyQueue()
        self._swapped = ReadyQueue()
        # Device blocks that come free with a copy to the host; jobs on their way back.
        self._leaving: dict[Job, int] = {}
        self._coming: dict[Job, None] = {}
        # Running jobs whose key changed since the last plan.
        self._moved: set[Job] = set()
        self._arrived: list[int] = []
        self._slots: int | None = None
        self.ahead: SwapPlanner | None = None
        if swap is not None and device_blocks is not None:
            self.ahead = SwapPlanner(policy, swap, device_blocks, self._paused, self._swapped)

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
    def quiet_blocks(self) -> int | None:
        """Idle device blocks beyond which no KV cache moves; None: some is moving or has to."""
        if len(self._swapped) or self._leaving or self._coming:
            return None
        return 0 if self.ahead is None else self.ahead.most_reserved

    @property
    def num_residents(self) -> int:
        """Jobs that have a place on the device, in the batch or not."""
        return len(self._running) + len(self._paused) + len(self._leaving) + len(self._coming)

    def state_counts(self) -> dict[JobState, int]:
        """Live jobs by state, in constant time."""
        counts = {
            JobState.QUEUED: len(self._queued) + len(self._loaded),
            JobState.RUNNING: len(self._running),
            JobState.PAUSED: len(self._paused),
            JobState.SWAPPING_OUT: len(self._leaving),
            JobState.SWAPPED: len(self._swapped),
            JobState.SWAPPING_IN: len(self._coming),
        }
        return {JobState.BLOCKED: len(self._jobs) - sum(counts.values()), **counts}

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

    def evict(self, job: Job, now_s: float, *, spilled: bool = False) -> None:
        """The job's device blocks are gone; it keeps its place in the order.

        Args:
            job: in whatever state.
            now_s: the time.
            spilled: its KV cache is on the host; otherwise it starts over.
        """
        if job.state is JobState.RUNNING:
            self._running.remove(job)
            self.policy.stop(job, now_s)
        self._leaving.pop(job, None)
        self._coming.pop(job, None)
        withdraw(job)
        if spilled:
            self._spill(job)
        else:
            self._requeue(job)

    def swapped_out(self, job: Job) -> None:
        """The job's KV cache is on the host and its device blocks are free."""
        del self._leaving[job]
        self._spill(job)

    def stayed(self, job: Job) -> None:
        """The copy to the host failed; the job's KV cache is on the device still."""
        del self._leaving[job]
        self._hold_paused(job)

    def swapped_in(self, job: Job) -> None:
        """The job's KV cache is on the device again."""
        del self._coming[job]
        job.unserved = True
        self._hold_paused(job)

    def missed(self, job: Job, now_s: float) -> None:
        """The host did not run a job of the plan's batch, which was resident before the plan."""
        if job.state is JobState.RUNNING:
            self._running.remove(job)
            self._pause(job, now_s)

    def observe(self, step_s: float, now_s: float, steps: int = 1) -> None:
        """Charge `step_s` seconds to the running jobs; demote and promote.

        Args:
            step_s: seconds that the last steps took.
            now_s: the time.
            steps: how many there were, all with the same batch; only in a simulation more than one.
        """
        self._moved.update(self.policy.charge(step_s))
        if steps > 1 and self.ahead is not None:
            self.ahead.skip(steps - 1)
        for job in self.policy.promote_starved(now_s):
            reposition(job)
            if job.state is JobState.PAUSED and self.ahead is not None:
                self.ahead.paused(job)

    def plan(self, limits: StepLimits, now_s: float) -> StepPlan:
        """Choose the next step's batch and move the jobs to their new states."""
        if limits.free_slots is not None:
            self._slots = limits.free_slots + self.num_residents
        if self._moved:
            self._reorder()
        if not limits.admit_queued:
            return self._drain(limits, now_s)
        joined, left, held = self._take_ready(limits)
        tokens, blocks = limits.bounds(self._running, joined)
        if not limits.hold(tokens, blocks, joined):
            candidates = sorted([*self._running, *left], key=_by_key)
            return self._fit(candidates, held, limits, now_s)
        if joined or left or held:
            self.counters.paused += len(left)
            # First to run first: who has waited equally long is promoted in this order.
            outside = [*reversed(left), *held]
            left += [job for job in held if job.state is JobState.RUNNING]
            self._put_back(outside, now_s)
            self._start(joined)
        plan = StepPlan(tuple(self._running), tuple(joined), tuple(left))
        return self._move_ahead(plan, limits, limits.free_blocks - blocks, now_s)

    def check_integrity(self) -> None:
        """Law I1: every live job is in exactly one state, and in the queue that the state means.

        Raises:
            AssertionError: naming the job.
        """
        running, paused = set(self._running), set(self._paused)
        swapped = set(self._swapped)
        queued = {*self._queued, *self._loaded}
        assert len(running) == len(self._running), "I1: a job runs twice"
        assert len(self._queued) + len(self._loaded) == len(queued), "I1: queued jobs miscounted"
        assert len(self._paused) == len(paused), "I1: the queue of paused jobs miscounts"
        assert len(self._swapped) == len(swapped), "I1: the queue of swapped jobs miscounts"
        places: dict[JobState, Collection[Job]] = {
            JobState.RUNNING: running,
            JobState.QUEUED: queued,
            JobState.PAUSED: paused,
            JobState.SWAPPING_OUT: self._leaving,
            JobState.SWAPPED: swapped,
            JobState.SWAPPING_IN: self._coming,
        }
        for job in self._jobs:
            for state, place in places.items():
                assert (job in place) == (job.state is state), f"I1: {job}"
        here = running | queued | paused | swapped | self._leaving.keys() | self._coming.keys()
        gone = here - self._jobs.keys()
        assert not gone, f"I1: jobs that left are still here: {gone}"

    def _queue(self, job: Job, now_s: float) -> None:
        self.policy.join(job, now_s)
        if self.ahead is not None:
            self._arrived.append(job.next_tokens)
        self._requeue(job)

    def _withdraw(self, job: Job) -> None:
        if job.state is JobState.BLOCKED:
            return
        if job.state is JobState.RUNNING:
            self._running.remove(job)
        self._leaving.pop(job, None)
        self._coming.pop(job, None)
        withdraw(job)
        self.policy.leave(job)

    def _reorder(self) -> None:
        """Put the running jobs whose key changed where they now belong."""
        moved = [job for job in self._moved if job.state is JobState.RUNNING]
        self._moved.clear()
        for job in moved:
            self._running.remove(job)
        for job in moved:
            insort(self._running, job, key=_by_key)

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
            swapped = self._swapped.first()
            # A job without KV cache takes no memory that one on the host ahead of it waits for.
            if swapped is None or queued.key < swapped.key:
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
        plan = self._regroup(chosen, passed, held, budget, now_s)
        if not limits.admit_queued:
            return plan
        # The growth of the batch comes first: about a block each until it is demoted.
        return self._move_ahead(plan, limits, budget.blocks_left - len(plan.batch), now_s)

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
        spilled = [job for job in victims if self._spills(job)]
        for job in victims:
            self._give_up(job, now_s, spilled=job in spilled)
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
        recomputed = [job for job in victims if job not in spilled]
        return StepPlan(
            batch=tuple(chosen),
            started=tuple(started),
            paused=tuple(paused),
            recomputed=tuple(recomputed),
            spilled=tuple(spilled),
        )

    def _spills(self, job: Job) -> bool:
        """Whether the job's KV cache is worth copying out and back, and the host has room."""
        swap = self.swap
        return swap is not None and worth_copying(swap, job) and swap.has_host_room(job)

    def _move_ahead(
        self, plan: StepPlan, limits: StepLimits, idle_blocks: int, now_s: float
    ) -> StepPlan:
        """Move KV cache ahead of need: part of the plan's batch may have to leave."""
        if self.ahead is None:
            return plan
        self.ahead.reserve.step(
            sum([n // limits.block_tokens + 1 for n in self._arrived]) if self._arrived else 0
        )
        self._arrived.clear()
        if not len(self._swapped) and idle_blocks >= self.ahead.most_reserved:
            self.ahead.relax()
            return plan
        room = Room(
            idle_blocks=max(idle_blocks, 0),
            freeing_blocks=sum(self._leaving.values()),
            idle_slots=None if self._slots is None else self._slots - self.num_residents,
            freeing_slots=len(self._leaving),
        )
        decision = self.ahead.decide(self._running, room, now_s, plan.spilled)
        for job in decision.swapped_in:
            self._coming[job] = None
            job.state = JobState.SWAPPING_IN
        self.counters.swapped_in += len(decision.swapped_in)
        self.counters.saved += len(decision.saved)
        gone = {*decision.swapped_out, *decision.dropped}
        plan = plan._replace(swapped_in=tuple(decision.swapped_in), saved=tuple(decision.saved))
        if not gone:
            return plan
        for job in decision.swapped_out:
            # None is not possible: such a job does not leave.
            self._leaving[job] = self.demand.freed_blocks(job) or 0
            self._depart(job, now_s)
            job.state = JobState.SWAPPING_OUT
        self.counters.swapped_out += len(decision.swapped_out)
        for job in decision.dropped:
            self._give_up(job, now_s, spilled=False)
        self._running = [job for job in self._running if job not in gone]
        return plan._replace(
            batch=tuple(job for job in plan.batch if job not in gone),
            started=tuple(job for job in plan.started if job not in gone),
            paused=tuple(job for job in plan.paused if job not in gone),
            recomputed=(*plan.recomputed, *decision.dropped),
            swapped_out=tuple(decision.swapped_out),
        )

    def _start(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            self.policy.start(job)
            job.state = JobState.RUNNING
            job.unserved = False
            self.counters.started += 1

    def _put_back(self, jobs: Iterable[Job], now_s: float) -> None:
        """Return jobs that do not run to the queues; a running one is paused."""
        for job in jobs:
            if job.state is JobState.QUEUED:
                self._requeue(job)
            elif job.state is JobState.PAUSED:
                self._hold_paused(job)
            else:
                self._pause(job, now_s)

    def _pause(self, job: Job, now_s: float) -> None:
        self.policy.stop(job, now_s)
        self._hold_paused(job)

    def _hold_paused(self, job: Job) -> None:
        job.state = JobState.PAUSED
        self._paused.push(job)
        if self.ahead is not None:
            self.ahead.paused(job)

    def _requeue(self, job: Job) -> None:
        job.state = JobState.QUEUED
        (self._loaded if self.demand.holds_kv(job) else self._queued).push(job)

    def _spill(self, job: Job) -> None:
        """The KV cache is on the host: come back ahead of need, or else when the turn has come."""
        if self.ahead is None:
            job.state = JobState.QUEUED
            self._queued.push(job)
        else:
            job.state = JobState.SWAPPED
            self._swapped.push(job)

    def _give_up(self, job: Job, now_s: float, *, spilled: bool) -> None:
        self._depart(job, now_s)
        self.counters.spilled += spilled
        self.counters.recomputed += not spilled
        if spilled:
            self._spill(job)
        else:
            # The host still holds its KV cache, but not for long.
            job.state = JobState.QUEUED
            self._queued.push(job)

    def _depart(self, job: Job, now_s: float) -> None:
        """The job stops running or being ready."""
        if job.state is JobState.RUNNING:
            self.policy.stop(job, now_s)
        withdraw(job)

    def _decline(self, reasons: dict[str, int]) -> None:
        for reason, times in reasons.items():
            self.counters.declined[reason] = self.counters.declined.get(reason, 0) + times
