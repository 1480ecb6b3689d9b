"""Whose KV cache leaves the device ahead of need, and whose comes back (section 4.2 of the paper).

The estimated next scheduled time (ENST) of a waiting job is the sooner of two: starvation
prevention promotes it, or every job of a higher level has been demoted to its own. Who has the
largest leaves first; who has the smallest comes back first. Jobs with equal ENST go by the total
order, and a more urgent priority class goes before any ENST.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.leavers import Leavers, Leaving
from fastserve_vllm.policy.queues import ReadyQueue
from fastserve_vllm.policy.room import BurstReserve, EventRate, Room

# The waiting jobs that starvation prevention reaches next are worth having on the device; those
# behind them wait for it longer than a copy takes, for promotions are rationed.
_NEXT_PROMOTED = 4
_MOST_RESERVED = 0.25
# Who is brought back for good shall stay for so many steps, since in each exchange the blocks of
# two jobs serve nobody for a step.
_LEAST_STAY = 32


class SwapDemand(Protocol):
    """What the host alone knows of a job's KV cache. Asked only of jobs that may be moved."""

    def new_blocks(self, job: Job) -> int:
        """Device blocks that its next step needs beyond those it holds."""
        ...

    def freed_blocks(self, job: Job) -> int | None:
        """Device blocks that its leaving frees; None: it cannot leave now."""
        ...

    def out_s(self, job: Job) -> float:
        """Seconds of copying to the host what it lacks of the job's KV cache."""
        ...

    def in_s(self, job: Job) -> float:
        """Seconds of copying the job's KV cache to the device."""
        ...

    def unsaved_blocks(self, job: Job) -> int:
        """Full device blocks of the job that the host lacks; 0 while some are on their way."""
        ...

    def recompute_s(self, job: Job) -> float:
        """Seconds of computing its KV cache again, in steps that run anyway."""
        ...

    def has_host_room(self, job: Job) -> bool:
        """Whether the host can take its KV cache."""
        ...


def worth_copying(demand: SwapDemand, job: Job) -> bool:
    """Whether copying the job's KV cache out and back is cheaper than computing it again."""
    return demand.out_s(job) + demand.in_s(job) < demand.recompute_s(job)


@dataclass(slots=True)
class SwapDecision:
    """What moves in a step.

    Attributes:
        swapped_out: jobs whose KV cache is copied to the host; they do not run meanwhile.
        swapped_in: jobs whose KV cache is copied back.
        dropped: jobs whose KV cache is cheaper to compute again than to copy twice.
        saved: jobs that go on, and whose full blocks are copied to the host meanwhile.
    """

    swapped_out: list[Job] = field(default_factory=list)
    swapped_in: list[Job] = field(default_factory=list)
    dropped: list[Job] = field(default_factory=list)
    saved: list[Job] = field(default_factory=list)


class SwapPlanner:
    """Decides which KV cache moves, after a step's batch was chosen.

    A job that starts or stops waiting costs O(log n). A decision costs O(levels), and O(log n) for
    each job that it moves.

    Args:
        policy: knows levels, quanta and promotions.
        demand: the host's answers.
        device_blocks: all blocks of the device.
        paused: the waiting jobs whose KV cache is on the device.
        swapped: the waiting jobs whose KV cache is on the host.

    Attributes:
        step_s: seconds that the last step took.
    """

    def __init__(
        self,
        policy: Policy,
        demand: SwapDemand,
        device_blocks: int,
        paused: ReadyQueue,
        swapped: ReadyQueue,
    ) -> None:
        self.policy = policy
        self.demand = demand
        self.reserve = BurstReserve()
        # Turns of jobs on the host: each takes the room of whoever would run last.
        self._turns = EventRate()
        self.step_s = 0.0
        self.most_reserved = int(_MOST_RESERVED * device_blocks)
        self._paused = paused
        self._swapped = swapped
        self._leavers = Leavers(self, paused)
        self.times: Sequence[float] = ()
        self._arrived: list[int] = []
        self._now_s = 0.0
        self._spilled: Collection[Job] = ()

    @property
    def reserved_blocks(self) -> int:
        """Blocks that shall be idle, or as good as idle."""
        return min(self.reserve.blocks, self.most_reserved)

    def arrived(self, tokens: int) -> None:
        """A job that wants room for so many tokens arrived since the last step."""
        self._arrived.append(tokens)

    def follow(self, idle_blocks: int, block_tokens: int) -> bool:
        """A step was planned: follow the arrivals.

        Args:
            idle_blocks: what the step leaves.
            block_tokens: tokens that a block holds.

        Returns:
            Whether there may be something to decide: not where nobody is on the host, and more
            blocks are idle than the reserve can be.
        """
        arrived = sum([n // block_tokens + 1 for n in self._arrived]) if self._arrived else 0
        self._arrived.clear()
        self.reserve.step(arrived)
        self._turns.step()
        if len(self._swapped) or idle_blocks < self.most_reserved:
            return True
        self._leavers.rest(1)
        return False

    def ran(self, step_s: float, steps: int) -> None:
        """So many steps took `step_s` seconds; in all but the last nobody arrived or moved."""
        if step_s:
            self.step_s = step_s / steps
        if steps > 1:
            self.reserve.skip(steps - 1)
            self._turns.skip(steps - 1)
            self._leavers.rest(steps - 1)

    def paused(self, job: Job) -> None:
        """The job began to wait, or its place changed while it waits, on the device."""
        self._leavers.push(job)

    def take_at_once(self, batch_size: int) -> Iterator[Job]:
        """Take from the host who has a turn, if its KV cache is better copied in the very step.

        Copied ahead of need, the blocks of who leaves and of who comes serve nobody for a step
        each. Copied at once, the whole batch waits: for the job's KV cache, and for about as much.

        Args:
            batch_size: jobs that run at a time.
        """
        while (job := self._swapped.first()) is not None and job.turn_s is not None:
            if batch_size * self.demand.in_s(job) >= self.step_s:
                return
            self._turns.add()
            yield self._swapped.pop()

    def enst_s(self, job: Job) -> float:
        """Estimated seconds until the job is next scheduled, at the last decision.

        Of a running job: until it would be again, were it to leave the batch now. Who has a turn
        would be at once.
        """
        if job.turn_s is not None:
            return 0.0
        if job.state is JobState.RUNNING:
            return self.times[job.level]
        return min(self.policy.promote_s(job, self._now_s), self.times[job.level])

    def decide(
        self,
        running: Sequence[Job],
        room: Room,
        now_s: float,
        spilled: Collection[Job] = (),
    ) -> SwapDecision:
        """Choose what moves now.

        Args:
            running: the step's batch, in order; its keys need not be up to date.
            room: what the step leaves; it is used up here.
            now_s: the time.
            spilled: jobs that this very step sends to the host; they do not come back in it.
        """
        decision = SwapDecision()
        reserved = self.reserved_blocks
        if not len(self._swapped) and room.idle_blocks + room.freeing_blocks >= reserved:
            return decision
        self._now_s = now_s
        self._spilled = spilled
        self.times = self.policy.execute_s(max(len(running), 1))
        leavers = Leaving(self, self._leavers, running[1:])
        outside = self._bring_back(decision, room)
        if outside is not None:
            self._exchange(decision, *outside, room, leavers)
        self._save(decision, room, leavers, reserved)
        for job in (*decision.dropped, *decision.swapped_out):
            self._paused.discard(job)
        return decision

    def _bring_back(self, decision: SwapDecision, room: Room) -> tuple[Job, int] | None:
        """Bring back who fits, the smallest ENST first.

        Returns:
            The first one who does not fit, and the blocks that it needs; None: there is none, or
            nobody is to be sent away for it.
        """
        while (job := self._first_back(decision.swapped_in)) is not None:
            settles = self._would_stay(job)
            if room.idle_blocks < 1 and not settles:
                return None
            blocks = self.demand.new_blocks(job)
            if not room.take(blocks):
                return (job, blocks) if settles else None
            self._turns.add(job.turn_s is not None)
            self._swapped.discard(job)
            decision.swapped_in.append(job)
        return None

    def _would_stay(self, job: Job) -> bool:
        """Whether somebody may be sent away for the job's sake.

        Each turn of a job on the host takes the room of whoever would run last. Where the next one
        comes soon, that is who had the last one: the job would bring its place back for nothing.
        """
        return job.turn_s is not None or self._turns.per_step * _LEAST_STAY < 1

    def _exchange(
        self, decision: SwapDecision, coming: Job, blocks: int, room: Room, leavers: Leaving
    ) -> None:
        """Send away, the largest ENST first, until the next one to come back fits."""
        while not room.will_hold(blocks):
            job = next(leavers, None)
            if job is None:
                return
            if not self._gains(coming, job):
                leavers.put_back(job)
                return
            freed = self.demand.freed_blocks(job)
            if freed and not job.unserved and self._sends_away(decision, job):
                room.free(freed)

    def _save(self, decision: SwapDecision, room: Room, leavers: Leaving, reserved: int) -> None:
        """Copy in advance what would leave next, until the reserve is idle or as good as idle."""
        covered = room.idle_blocks + room.freeing_blocks
        while covered < reserved and (job := next(leavers, None)) is not None:
            covered += self.demand.freed_blocks(job) or 0
            if self.demand.unsaved_blocks(job) and (
                self.demand.in_s(job) < self.demand.recompute_s(job)
            ):
                decision.saved.append(job)
        leavers.close()

    def _first_back(self, coming: Sequence[Job]) -> Job | None:
        """The job on the host with the smallest ENST.

        Levels below are not executed sooner, and who has waited longest is promoted first: so it
        is the first of the total order, or the first that will be promoted.
        """
        first = self._swapped.first()
        if first is None or first in self._spilled:
            return None
        first_s = self.enst_s(first)
        # Nobody is promoted sooner than at once. So it is in most steps, which then need not ask.
        if first_s <= 0.0:
            return first
        for job in self.policy.next_promoted(_NEXT_PROMOTED):
            if job.state is JobState.SWAPPED and job not in coming and job not in self._spilled:
                sooner = self.enst_s(job) < first_s
                return job if sooner and job.priority <= first.priority else first
        return first

    def _sends_away(self, decision: SwapDecision, job: Job) -> bool:
        """Send the job's KV cache away if possible, by whatever is cheaper."""
        if not worth_copying(self.demand, job):
            decision.dropped.append(job)
        elif self.demand.has_host_room(job):
            decision.swapped_out.append(job)
        else:
            return False
        return True

    def _gains(self, coming: Job, leaver: Job) -> bool:
        """Whether `coming` should have the place of `leaver`.

        It must stand before it, and have a longer turn than the copies take: what is left of its
        quantum. Since whoever came back also stays until it has run, each exchange serves a turn.
        """
        runs = leaver.state is JobState.RUNNING
        key = self.policy.key_among_running(coming) if runs else coming.key
        if key >= leaver.key:
            return False
        turn_s = self.policy.turn_left_s(coming)
        return turn_s > self.demand.out_s(leaver) + self.demand.in_s(coming)
