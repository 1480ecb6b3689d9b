"""Whose KV cache leaves the device ahead of need, and whose comes back (section 4.2 of the paper).

The estimated next scheduled time (ENST) of a waiting job is the sooner of two: starvation
prevention promotes it, or every job of a higher level has been demoted to its own. Who has the
largest leaves first; who has the smallest comes back first. Jobs with equal ENST go by the total
order, and a more urgent priority class goes before any ENST.
"""

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from fastserve_vllm.policy.base import Policy
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.queues import ReadyQueue

_SLACK = 64
_QUIET_STEPS = 256
# The waiting jobs that starvation prevention reaches next are worth having on the device; those
# behind them wait for it longer than a copy takes, for promotions are rationed.
_NEXT_PROMOTED = 4
_MOST_RESERVED = 0.25


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


class BurstReserve:
    """Device blocks to keep ready for arrivals: what the largest recent burst of them asked for.

    Ready are blocks that are idle, or whose content the host has already.

    A burst is what arrives within `window` steps, the time in which leaving jobs free no block
    yet. The reserve follows the largest one and forgets it by half every `half_life` steps.
    """

    def __init__(self, *, window: int = 4, half_life: int = 256) -> None:
        self._recent: deque[int] = deque([0] * window, maxlen=window)
        self._sum = 0
        self._decay = 0.5 ** (1 / half_life)
        self._peak = 0.0

    def step(self, arrived_blocks: int) -> None:
        """A step was planned; jobs that want so many blocks arrived since the one before."""
        self._sum += arrived_blocks - self._recent[0]
        self._recent.append(arrived_blocks)
        self._peak = max(self._peak * self._decay, float(self._sum))

    def skip(self, steps: int) -> None:
        """So many steps were planned in which nobody arrived."""
        for _ in range(min(steps, len(self._recent))):
            self.step(0)
        self._peak *= self._decay ** max(steps - len(self._recent), 0)

    @property
    def blocks(self) -> int:
        """The reserve; 0 once arrivals have long stopped."""
        return int(self._peak)


@dataclass(slots=True)
class Room:
    """What a step leaves of the device, for those who come back.

    Attributes:
        idle_blocks: blocks that neither the step nor the growth of its jobs needs.
        freeing_blocks: blocks whose copies to the host are on their way.
        idle_slots: model-runner slots that nobody holds; None where waiting keeps none.
        freeing_slots: slots that come free with those copies.
    """

    idle_blocks: int
    freeing_blocks: int = 0
    idle_slots: int | None = None
    freeing_slots: int = 0

    def take(self, blocks: int) -> bool:
        """Give a job its blocks and a slot, if there are enough now."""
        if blocks > self.idle_blocks or (self.idle_slots is not None and self.idle_slots < 1):
            return False
        self.idle_blocks -= blocks
        if self.idle_slots is not None:
            self.idle_slots -= 1
        return True

    def free(self, blocks: int) -> None:
        """A job is on its way out."""
        self.freeing_blocks += blocks
        self.freeing_slots += 1

    def will_hold(self, blocks: int) -> bool:
        """Whether a job fits once everybody who is on the way out has left."""
        if self.idle_slots is not None and self.idle_slots + self.freeing_slots < 1:
            return False
        return blocks <= self.idle_blocks + self.freeing_blocks


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
        self.most_reserved = int(_MOST_RESERVED * device_blocks)
        self._paused = paused
        self._swapped = swapped
        self._leavers = _Leavers(self, paused)
        self.times: Sequence[float] = ()
        self._now_s = 0.0
        self._spilled: Collection[Job] = ()

    @property
    def reserved_blocks(self) -> int:
        """Blocks that shall be idle, or as good as idle."""
        return min(self.reserve.blocks, self.most_reserved)

    def relax(self, steps: int = 1) -> None:
        """Steps left more blocks idle than the reserve can be: there is nothing to decide."""
        self._leavers.rest(steps)

    def skip(self, steps: int) -> None:
        """So many steps were planned in which nobody arrived and nothing was to decide."""
        self.reserve.skip(steps)
        self.relax(steps)

    def paused(self, job: Job) -> None:
        """The job began to wait, or its place changed while it waits, on the device."""
        self._leavers.push(job)

    def enst_s(self, job: Job) -> float:
        """Estimated seconds until the job is next scheduled, at the last decision.

        Of a running job: until it would be again, were it to leave the batch now.
        """
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
            running: the step's batch, in order.
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
        self._bring_back(decision, room)
        leavers = _Leaving(self, self._leavers, running[1:])
        self._exchange(decision, room, leavers)
        self._save(decision, room, leavers, reserved)
        for job in (*decision.dropped, *decision.swapped_out):
            self._paused.discard(job)
        return decision

    def _bring_back(self, decision: SwapDecision, room: Room) -> None:
        """Bring back who fits, the smallest ENST first."""
        while (job := self._first_back(decision.swapped_in)) is not None:
            blocks = self.demand.new_blocks(job)
            if not room.take(blocks):
                break
            self._swapped.discard(job)
            decision.swapped_in.append(job)

    def _exchange(self, decision: SwapDecision, room: Room, leavers: "_Leaving") -> None:
        """Send away, the largest ENST first, until the next one to come back fits."""
        coming = self._first_back(decision.swapped_in)
        if coming is None:
            return
        blocks = self.demand.new_blocks(coming)
        for job in leavers:
            if room.will_hold(blocks) or not self._gains(coming, job):
                leavers.put_back(job)
                return
            freed = self.demand.freed_blocks(job)
            if freed and not job.unserved and self._sends_away(decision, job):
                room.free(freed)

    def _save(self, decision: SwapDecision, room: Room, leavers: "_Leaving", reserved: int) -> None:
        """Copy in advance what would leave next, until the reserve is idle or as good as idle."""
        covered = room.idle_blocks + room.freeing_blocks
        for job in leavers:
            if covered >= reserved:
                break
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
        for job in self.policy.next_promoted(_NEXT_PROMOTED):
            if job.state is JobState.SWAPPED and job not in coming and job not in self._spilled:
                sooner = self.enst_s(job) < self.enst_s(first)
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
        if coming.key >= leaver.key:
            return False
        turn_s = self.policy.turn_left_s(coming)
        return turn_s > self.demand.out_s(leaver) + self.demand.in_s(coming)


_Entry = tuple[float, int, Job, tuple[float, ...], float]


class _Leavers:
    """The paused jobs by priority class and level; finds the largest ENST among them.

    In one class and level all jobs have the same time to execution. So the largest ENST has the
    last of the order, unless that one is promoted before it is executed: then whoever began to
    wait last. Entries of jobs that went elsewhere turn stale and are dropped when they surface.
    """

    def __init__(self, planner: SwapPlanner, paused: ReadyQueue) -> None:
        self._planner = planner
        self._paused = paused
        self._groups: dict[tuple[int, int], tuple[list[_Entry], list[_Entry]]] = {}
        self._numbers = count()
        self._size = 0
        # Nothing is kept while nobody has asked for long.
        self._asked = False
        self._unasked_steps = 0

    def rest(self, steps: int) -> None:
        """Steps have passed in which nobody would ask."""
        self._unasked_steps += steps
        if self._asked and self._unasked_steps > _QUIET_STEPS:
            self._asked = False
            self._groups.clear()

    def push(self, job: Job) -> None:
        """Add a paused job, or follow its change of place."""
        if not self._asked:
            return
        self._size += 1
        if self._size > _SLACK + 2 * len(self._paused):
            self._rebuild()
        self._add(job)

    def largest(self, taken: Collection[Job]) -> Job | None:
        """The paused job with the largest (priority, ENST, key), those `taken` left aside."""
        self._unasked_steps = 0
        if not self._asked:
            self._asked = True
            self._rebuild()
        best: tuple[int, float, tuple[float, ...]] | None = None
        found = None
        enst_s = self._planner.enst_s
        for (priority, level), (by_key, by_wait) in list(self._groups.items()):
            if best is not None and (priority, self._planner.times[max(level, 0)]) < best[:2]:
                continue
            last = self._surface(by_key, taken)
            latest = self._surface(by_wait, taken)
            if last is None or latest is None:
                if not by_key:
                    del self._groups[priority, level]
                continue
            job = last if enst_s(last) >= enst_s(latest) else latest
            rank = (priority, enst_s(job), job.key)
            if best is None or rank > best:
                best, found = rank, job
        return found

    def _add(self, job: Job) -> None:
        group = self._groups.setdefault((job.priority, int(job.key[1])), ([], []))
        number = next(self._numbers)
        for heap, rank in zip(group, (job.key[2], job.waiting_since_s), strict=True):
            heapq.heappush(heap, (-rank, number, job, job.key, job.waiting_since_s))

    def _rebuild(self) -> None:
        self._groups.clear()
        self._size = 0
        for job in self._paused:
            self._size += 1
            self._add(job)

    @staticmethod
    def _surface(heap: list[_Entry], taken: Iterable[Job]) -> Job | None:
        """The heap's first live job; the entries of those taken are dropped like stale ones."""
        while heap:
            _, _, job, key, since_s = heap[0]
            # One that left for good keeps its state, but has no ticket any more.
            live = job.state is JobState.PAUSED and job.ticket is not None and job.key is key
            if live and job.waiting_since_s == since_s and job not in taken:
                return job
            heapq.heappop(heap)
        return None


class _Leaving:
    """Iterates over the jobs on the device, the largest ENST first, the waiting before the running.

    Args:
        planner: knows the ENST of each.
        leavers: the waiting ones, who lose whom this yields until `close`.
        running: the running ones, in order.
    """

    def __init__(self, planner: SwapPlanner, leavers: _Leavers, running: Sequence[Job]) -> None:
        self._planner = planner
        self._leavers = leavers
        self._running = list(running)
        self._taken: list[Job] = []
        self._back: list[Job] = []

    def __iter__(self) -> Iterator[Job]:
        return self

    def __next__(self) -> Job:
        if self._back:
            return self._back.pop()
        waiting = self._leavers.largest(self._taken)
        runner = self._running[-1] if self._running else None
        if waiting is not None and (runner is None or self._leaves_before(waiting, runner)):
            self._taken.append(waiting)
            return waiting
        if runner is None:
            raise StopIteration
        return self._running.pop()

    def put_back(self, job: Job) -> None:
        """Yield the job once more."""
        self._back.append(job)

    def close(self) -> None:
        """Give the waiting jobs back."""
        for job in self._taken:
            self._leavers.push(job)

    def _leaves_before(self, waiting: Job, runner: Job) -> bool:
        enst_s = self._planner.enst_s
        return (waiting.priority, enst_s(waiting)) >= (runner.priority, enst_s(runner))
