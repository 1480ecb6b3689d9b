"""Chooses each step's batch: the first jobs of the total order that the step has room for."""

from collections.abc import Iterable, Sequence

from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.budget import Demand, StepLimits
from fastserve_vllm.policy.job import Job, JobState, by_key
from fastserve_vllm.policy.queues import reposition, withdraw
from fastserve_vllm.policy.room import Room
from fastserve_vllm.policy.roster import Roster
from fastserve_vllm.policy.step_plan import StepCounters, StepPlan
from fastserve_vllm.policy.swap import SwapDecision, SwapDemand, SwapPlanner, worth_copying
from fastserve_vllm.policy.walk import Walk


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

    Attributes:
        roster: the live jobs by state, for those who look only.
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
        self.counters = StepCounters.of(policy.num_levels)
        self.roster = roster = Roster()
        # Running jobs whose key changed since the last plan.
        self._moved: set[Job] = set()
        self._slots: int | None = None
        self.ahead: SwapPlanner | None = None
        if swap is not None and device_blocks is not None:
            self.ahead = SwapPlanner(policy, swap, device_blocks, roster.paused, roster.swapped)

    def __len__(self) -> int:
        return len(self.roster.jobs)

    @property
    def jobs(self) -> Iterable[Job]:
        """All live jobs."""
        return self.roster.jobs.keys()

    @property
    def running(self) -> tuple[Job, ...]:
        """The jobs of the last plan that still run."""
        return tuple(self.roster.running)

    @property
    def quiet_blocks(self) -> int | None:
        """Idle device blocks beyond which no KV cache moves; None: some is moving or has to."""
        roster = self.roster
        if len(roster.swapped) or roster.leaving or roster.coming:
            return None
        return 0 if self.ahead is None else self.ahead.most_reserved

    def add(self, job: Job, now_s: float) -> None:
        """A job arrives, able to run."""
        self.roster.jobs[job] = None
        self._join(job, now_s)

    def add_blocked(self, job: Job) -> None:
        """A job arrives that cannot run yet; `unblock` lets it join."""
        self.roster.jobs[job] = None
        self.roster.block(job)

    def remove(self, job: Job) -> None:
        """A job finished or was aborted, in whatever state."""
        self._leave(job)
        self._moved.discard(job)
        del self.roster.jobs[job]
        self.counters.finished += 1

    def block(self, job: Job) -> None:
        """The job waits for something other than a turn."""
        self._leave(job)
        self.roster.block(job)

    def unblock(self, job: Job, now_s: float) -> None:
        """What the job waited for has come: it joins as on arrival."""
        self._join(job, now_s)

    def evict(self, job: Job, now_s: float, *, spilled: bool = False, cause: str = "host") -> None:
        """The job's device blocks are gone; it keeps its place in the order.

        Args:
            job: in whatever state.
            now_s: the time.
            spilled: its KV cache is on the host; otherwise it starts over.
            cause: of the preemption, if it runs; see `StepCounters`.
        """
        self.counters.take_blocks(job, "spilled" if spilled else "recomputed", cause)
        if job.state is JobState.RUNNING:
            self.policy.stop(job, now_s)
        self.roster.take(job)
        if spilled:
            self._spill(job)
        else:
            self._requeue(job)

    def swapped_out(self, job: Job) -> None:
        """The job's KV cache is on the host and its device blocks are free."""
        del self.roster.leaving[job]
        self._spill(job)

    def stayed(self, job: Job) -> None:
        """The copy to the host failed; the job's KV cache is on the device still."""
        del self.roster.leaving[job]
        self._hold_paused(job)

    def swapped_in(self, job: Job) -> None:
        """The job's KV cache is on the device again."""
        del self.roster.coming[job]
        job.unserved = True
        self._hold_paused(job)

    def missed(self, job: Job, now_s: float) -> None:
        """The host did not run a job of the plan's batch, which was resident before the plan."""
        if job.state is JobState.RUNNING:
            self.roster.take(job)
            self._pause(job, now_s)
            self.counters.preempt("paused", "host")

    def observe(
        self, step_s: float, now_s: float, steps: int = 1
    ) -> tuple[Sequence[Job], Sequence[Job]]:
        """Charge `step_s` seconds to the running jobs; demote and promote.

        Args:
            step_s: seconds that the last steps took.
            now_s: the time.
            steps: how many there were, all with the same batch; more than one where nothing moved.

        Returns: running jobs whose place changed, and waiting ones that were raised.
        """
        self._moved.update(moved := self.policy.charge(step_s))
        if self.ahead is not None:
            self.ahead.ran(step_s, steps)
        raised = self.policy.promote_starved(now_s)
        for job in raised:
            reposition(job)
            if job.state is JobState.PAUSED and self.ahead is not None:
                self.ahead.paused(job)
        return moved, raised

    def plan(self, limits: StepLimits, now_s: float) -> StepPlan:
        """Choose the next step's batch and move the jobs to their new states."""
        if limits.free_slots is not None:
            self._slots = limits.free_slots + self.roster.num_residents
        if self._moved:
            self.roster.reorder(self._moved)
            self._moved.clear()
        if not limits.admit_queued:
            return self._drain(limits, now_s)
        if self.ahead is not None and not limits.overlapping:
            for job in self.ahead.take_at_once(len(self.roster.running)):
                self._requeue(job)
        joined, left, held = self._take_ready(limits)
        tokens, blocks = limits.bounds(self.roster.running, joined)
        # The bound has a block of growth for everybody.
        idle_blocks = limits.free_blocks - blocks
        if idle_blocks < 0 and limits.hold(tokens, 0, joined):
            # Few who decode need a block in a step. Asking all is cheaper than walking the order.
            blocks = limits.blocks_for(self.roster.running, joined, self.demand)
            idle_blocks = limits.free_blocks - blocks - limits.growth(len(self.roster.running))
        if not limits.hold(tokens, blocks, joined):
            self.roster.send_back(joined, self.policy)
            return self._fit([*self.roster.running, *left], held, limits, now_s)
        if joined or left or held:
            self.counters.pause(len(left))
            # First to run first: who has waited equally long is promoted in this order.
            outside = [*reversed(left), *held]
            left += [job for job in held if job.state is JobState.RUNNING]
            self._put_back(outside, now_s)
            self._start(joined)
        batch = tuple(self.roster.running)
        plan = StepPlan(
            batch=batch,
            started=tuple(joined),
            paused=tuple(left),
            held=tuple(held),
            single_tokens=tokens == len(batch),
        )
        return self._move_ahead(plan, limits, idle_blocks, now_s)

    def check_integrity(self) -> None:
        """Law I1; raises as `Roster.check_integrity` does."""
        self.roster.check_integrity()

    def _join(self, job: Job, now_s: float) -> None:
        self.policy.join(job, now_s)
        self.counters.joined[job.level] += 1
        if self.ahead is not None:
            self.ahead.arrived(job.next_tokens)
        self._requeue(job)

    def _leave(self, job: Job) -> None:
        if job.state is not JobState.BLOCKED:
            self.roster.take(job)
            self.policy.leave(job)

    def _take_ready(self, limits: StepLimits) -> tuple[list[Job], list[Job], list[Job]]:
        """Let the first jobs of the order that have something to compute run.

        Returns:
            The jobs that joined them, the running ones that they displaced, and those held back
            because all that they have to compute is in flight.
        """
        roster = self.roster
        held = self._hold_back(roster.running) if limits.overlapping else []
        joined, left = roster.fill(limits.batch_limit, self.policy)
        newest = joined
        while limits.overlapping and (unready := self._hold_back(newest)):
            held += unready
            gone = set(unready)
            joined = [job for job in joined if job not in gone]
            # There is room again, first of all for the displaced.
            roster.running = sorted([*roster.running, *left], key=by_key)
            newest, left = roster.fill(limits.batch_limit, self.policy)
            joined += newest
        roster.send_back(held, self.policy)
        return joined, left, held

    def _hold_back(self, jobs: Sequence[Job]) -> list[Job]:
        """Take those of the running jobs out that have nothing to compute, and return them."""
        unready = self.demand.unready(jobs)
        if unready:
            self.roster.take_out(unready)
        return unready

    def _drain(self, limits: StepLimits, now_s: float) -> StepPlan:
        """Nothing new may start: choose among the jobs that hold KV cache."""
        roster = self.roster
        holders = [*roster.paused, *roster.loaded]
        for job in holders:
            withdraw(job)
        return self._fit([*roster.running, *holders], [], limits, now_s)

    def _fit(
        self, candidates: list[Job], held: list[Job], limits: StepLimits, now_s: float
    ) -> StepPlan:
        """Walk the total order and give each job what is still there.

        Args:
            candidates: jobs taken out of the queues or still running.
            held: jobs taken out that have nothing to compute.
            limits: the room of the step.
            now_s: the time.
        """
        self.roster.refresh(self.policy)
        candidates.sort(key=by_key)
        walk = Walk(self.roster, candidates, held, limits, self.demand)
        self.counters.decline(walk.budget.declined)
        plan = self._regroup(walk, now_s)
        if not limits.admit_queued:
            return plan
        idle_blocks = walk.budget.blocks_left - limits.growth(len(plan.batch))
        return self._move_ahead(plan, limits, idle_blocks, now_s)

    def _regroup(self, walk: Walk, now_s: float) -> StepPlan:
        """Give every job of a walk the state that its new place means."""
        chosen, held = walk.chosen, walk.held
        victims, partial = walk.budget.victims, walk.budget.partial
        spilled = [job for job in victims if self._spills(job)]
        for job in victims:
            self.counters.take_blocks(job, "spilled" if job in spilled else "recomputed", "memory")
            self._give_up(job, now_s, spilled=job in spilled)
        left = [job for job in (*walk.passed, *held) if job not in victims]
        paused = [job for job in left if job.state is JobState.RUNNING]
        self.counters.pause(len(paused) - sum(job.state is JobState.RUNNING for job in held))
        started = [job for job in chosen if job.state is not JobState.RUNNING]
        self._put_back(left, now_s)
        self.roster.running = chosen.copy()
        self._start(started)
        if partial is not None:
            chosen.remove(partial)
            chosen.append(partial)
        return StepPlan(
            batch=tuple(chosen),
            started=tuple(started),
            paused=tuple(paused),
            recomputed=tuple(job for job in victims if job not in spilled),
            spilled=tuple(spilled),
            held=tuple(held),
        )

    def _spills(self, job: Job) -> bool:
        """Whether the job's KV cache is worth copying out and back, and the host has room."""
        swap = self.swap
        return swap is not None and worth_copying(swap, job) and swap.has_host_room(job)

    def _move_ahead(
        self, plan: StepPlan, limits: StepLimits, idle_blocks: int, now_s: float
    ) -> StepPlan:
        """Move KV cache ahead of need: part of the plan's batch may have to leave."""
        ahead, roster = self.ahead, self.roster
        if ahead is None or not ahead.follow(idle_blocks, limits.block_tokens):
            return plan
        room = Room(
            idle_blocks=max(idle_blocks, 0),
            freeing_blocks=roster.leaving_blocks,
            idle_slots=None if self._slots is None else self._slots - roster.num_residents,
            freeing_slots=len(roster.leaving),
        )
        decision = ahead.decide(roster.running, room, now_s, plan.spilled)
        for job in decision.swapped_in:
            roster.bring_in(job)
        self.counters.swapped_in += len(decision.swapped_in)
        self.counters.saved += len(decision.saved)
        plan = plan._replace(swapped_in=tuple(decision.swapped_in), saved=tuple(decision.saved))
        if decision.swapped_out or decision.dropped:
            plan = self._send_away(plan, decision, now_s)
        return plan

    def _send_away(self, plan: StepPlan, decision: SwapDecision, now_s: float) -> StepPlan:
        """Take those who leave the device out of the batch."""
        gone = {*decision.swapped_out, *decision.dropped}
        for job in decision.swapped_out:
            self.counters.send_away(job, plan, "swapped_out")
            self._depart(job, now_s)
            # None is not possible: such a job does not leave.
            self.roster.send_out(job, self.demand.freed_blocks(job) or 0)
        self.counters.swapped_out += len(decision.swapped_out)
        for job in decision.dropped:
            self.counters.send_away(job, plan, "recomputed")
            self._give_up(job, now_s, spilled=False)
        self.roster.take_out(gone)
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
            self.roster.run(job)
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
        self.roster.pause(job)
        if self.ahead is not None:
            self.ahead.paused(job)

    def _requeue(self, job: Job) -> None:
        self.roster.queue(job, loaded=self.demand.holds_kv(job))

    def _spill(self, job: Job) -> None:
        """The KV cache is on the host: come back ahead of need, or else when the turn has come."""
        (self.roster.queue if self.ahead is None else self.roster.swap)(job)

    def _give_up(self, job: Job, now_s: float, *, spilled: bool) -> None:
        self._depart(job, now_s)
        self.counters.spilled += spilled
        self.counters.recomputed += not spilled
        if spilled:
            self._spill(job)
        else:
            # The host still holds its KV cache, but not for long.
            self.roster.queue(job)

    def _depart(self, job: Job, now_s: float) -> None:
        """The job stops running or being ready."""
        if job.state is JobState.RUNNING:
            self.policy.stop(job, now_s)
        withdraw(job)
