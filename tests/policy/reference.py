"""What the policy is checked against: the same laws, written the slow and obvious way."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter

from fastserve_vllm.policy.ageing import AbsoluteAgeing, Ageing, RelativeAgeing, withdraw
from fastserve_vllm.policy.budget import StepBudget, StepLimits, Verdict
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder
from fastserve_vllm.policy.walk import LOOKAHEAD

by_key = attrgetter("key")


@dataclass(eq=False)
class Record:
    """A job as the naive policy sees it.

    `due_s` is when somebody next looks whether it has waited for too long; None: nobody will.
    `overdue_s` is since when it has, where that was found; None: it was not.
    `turn_s` is None where it has no turn, and infinite before its turn begins.
    """

    job: Job
    arrival: int
    joined_s: float
    last: int
    weight: float
    level: int = 0
    grace_s: float = 0.0
    entry: int = 0
    attained_s: float = 0.0
    served_s: float = 0.0
    running: bool = False
    waiting_since_s: float = 0.0
    due_s: float | None = None
    overdue_s: float | None = None
    due_number: int = 0
    turn_s: float | None = None
    turn_entry: int = 0
    turn_tokens: int = 0
    turn_ran_s: float = 0.0
    longer_s: float = 0.0

    @property
    def rank(self) -> tuple[float, ...]:
        """Its place among all: priority class, turns, level, place in the level, arrival."""
        priority = self.job.priority
        if self.turn_s is not None:
            return (priority, -1, self.turn_entry)
        return (priority, self.level, self.place, self.arrival)

    @property
    def place(self) -> float:
        """In its level: last come, last served; in the last level, service makes older.

        So does service that its answer is expected to be shorter by. To the microsecond.
        """
        if self.level < self.last:
            return self.entry
        return round(self.joined_s + self.weight * (self.longer_s - self.served_s), 6)


def naive_patience_s(ageing: Ageing, base_s: float, job: Job, served_s: float) -> float:
    """Seconds that a job waits at most, in the state that it is in."""
    if isinstance(ageing, AbsoluteAgeing):
        return ageing.limit_s
    gap_s = max(ageing.gap_s, ageing.gap_quanta * base_s)
    cost_s = 0.0
    if job.state not in (JobState.PAUSED, JobState.RUNNING):
        cost_s = ageing.ratio * served_s
    if job.state is JobState.QUEUED:
        cost_s = max(cost_s, 10 * job.first_step_s)
    return sorted([min(gap_s, ageing.limit_s), cost_s, ageing.limit_s])[1]


class NaiveMlfq:
    """Charges every running job in every step, and scans every job for everything else."""

    def __init__(self, policy: SkipJoinMlfq) -> None:
        self.policy = policy
        self.records: dict[Job, Record] = {}
        self.arrivals = self.entries = self.looks = 0
        self.demotions = self.promotions = self.turns = 0
        # Both have tests of their own. Here they are fed with what is seen here.
        self.lengths = copy.deepcopy(policy.lengths)
        self.first_tokens = copy.deepcopy(policy.first_tokens)

    @property
    def ladder(self) -> QuantumLadder:
        return self.policy.ladder

    @property
    def last(self) -> int:
        return self.ladder.num_levels - 1

    def order(self) -> list[Job]:
        """All jobs, first to run first."""
        return sorted(self.records, key=lambda job: self.records[job].rank)

    def quantum_s(self, record: Record) -> float:
        return self.ladder.quanta_s[record.level] + record.grace_s

    def left_s(self, record: Record) -> float:
        """What is left of a running job's turn, or of its quantum."""
        if record.turn_s is not None:
            return record.turn_s - record.turn_ran_s
        return self.quantum_s(record) - record.attained_s

    def join(self, job: Job, now_s: float) -> None:
        record = Record(job, self.arrivals, now_s, self.last, self.policy.service_weight)
        self.records[job] = record
        self.arrivals += 1
        level = 0
        if self.policy.skip_join:
            while level < self.last - 1 and self.ladder.quanta_s[level] < job.first_step_s:
                level += 1
            if not self.has_room(job, now_s):
                level = self.last
        self._enter(record, level)
        if self.policy.skip_join and job.first_step_s > self.ladder.quanta_s[level]:
            record.grace_s = job.first_step_s - self.ladder.quanta_s[level]
        self._wait(record, now_s)

    def has_room(self, job: Job, now_s: float) -> bool:
        """Whether its first token is within the share of all first tokens."""
        ageing = self.policy.ageing
        if self.first_tokens is None or not isinstance(ageing, RelativeAgeing):
            return True
        gap_s = max(ageing.gap_s, ageing.gap_quanta * self.ladder.base_s)
        hold_up_s = job.first_step_s - min(self.ladder.base_s, job.first_step_s)
        return self.first_tokens.takes(hold_up_s, now_s, min(gap_s, ageing.limit_s))

    def leave(self, job: Job) -> None:
        record = self.records.pop(job)
        if self.lengths is not None:
            self.lengths.end(job.prompt_tokens, record.served_s, running=record.running)

    def start(self, job: Job) -> None:
        record = self.records[job]
        record.running, record.due_s, record.overdue_s = True, None, None
        if record.turn_s is not None:
            # One step, or the time that the first token is said to take.
            queued = job.state is JobState.QUEUED
            record.turn_s, record.turn_ran_s = (job.first_step_s if queued else 0.0), 0.0
            record.turn_tokens = job.next_tokens if queued else 0

    def stop(self, job: Job, now_s: float) -> None:
        record = self.records[job]
        record.running = False
        self._wait(record, now_s)

    def charge(self, step_s: float) -> None:
        over = []
        if self.lengths is not None:
            self.lengths.charge(step_s)
        for record in self.records.values():
            if record.running:
                record.attained_s += step_s
                record.served_s += step_s
                record.turn_ran_s += step_s
                if self.left_s(record) <= 0:
                    over.append(record)
        for record in sorted(over, key=lambda r: (self.left_s(r), r.arrival)):
            if record.turn_s is not None:
                before, record.turn_tokens = record.turn_tokens, record.job.next_tokens
                if record.turn_tokens < before:
                    # It may be on the way to its first token still: one more step.
                    record.turn_s, record.turn_ran_s = 0.0, 0.0
                    continue
                record.turn_s = None
            if record.attained_s >= self.quantum_s(record):
                self._enter(record, record.level + 1)
                self.demotions += 1

    def promote_starved(self, now_s: float) -> None:
        while due := [r for r in self.records.values() if r.due_s is not None and r.due_s <= now_s]:
            record = min(due, key=attrgetter("due_s", "due_number"))
            if isinstance(self.policy.ageing, AbsoluteAgeing):
                self._promote(record, self.policy.ageing.limit_s)
            else:
                self._look(record, now_s)
        while due := [r for r in self.records.values() if r.overdue_s is not None]:
            record = min(due, key=lambda r: (r.job.priority, r.overdue_s, r.due_number))
            if not self._take_turn(record, now_s):
                break

    def _promote(self, record: Record, limit_s: float) -> None:
        record.due_s = None
        endless = record.job.state is JobState.QUEUED and 2 * record.job.first_step_s >= limit_s
        if record.level > 0 and not endless:
            self._enter(record, 0)
            self.promotions += 1

    def _take_turn(self, record: Record, now_s: float) -> bool:
        """Give who is overdue a turn; False where its class and those above have all they may."""
        if self.turns_in_class(record.job.priority) >= self.policy.ageing.most_turns:
            return False
        self._look(record, now_s)
        if record.overdue_s is None:
            return True
        self.entries += 1
        record.overdue_s, record.turn_s, record.turn_entry = None, math.inf, self.entries
        self.turns += 1
        return True

    def turns_in_class(self, priority: int) -> int:
        """Turns of jobs that are at least as urgent."""
        held = [r for r in self.records.values() if r.turn_s is not None]
        return sum(record.job.priority <= priority for record in held)

    def _look(self, record: Record, now_s: float) -> None:
        """Learn whether the job has waited for too long, as it is now."""
        ageing = self.policy.ageing
        patience_s = naive_patience_s(ageing, self.ladder.base_s, record.job, record.served_s)
        due_s = record.waiting_since_s + patience_s
        self._look_again(record, due_s)
        record.overdue_s = None
        if due_s <= now_s:
            record.due_s, record.overdue_s = None, due_s

    def _enter(self, record: Record, level: int) -> None:
        self.entries += 1
        record.level, record.entry = level, self.entries
        record.attained_s = record.grace_s = 0.0
        if level == self.last and self.lengths is not None:
            record.longer_s = self.lengths.longer_s(record.job.prompt_tokens)

    def _wait(self, record: Record, now_s: float) -> None:
        record.waiting_since_s = now_s
        ageing = self.policy.ageing
        if isinstance(ageing, AbsoluteAgeing):
            self._look_again(record, now_s + ageing.limit_s)
        elif ageing is not None and record.turn_s is None:
            gap_s = max(ageing.gap_s, ageing.gap_quanta * self.ladder.base_s)
            self._look_again(record, now_s + min(gap_s, ageing.limit_s))

    def _look_again(self, record: Record, due_s: float) -> None:
        self.looks += 1
        record.due_s, record.due_number = due_s, self.looks


class CheckedMlfq(SkipJoinMlfq):
    """The policy under test and the naive one, side by side; `compare` says that they agree."""

    def __init__(self, ladder: QuantumLadder, **options: object) -> None:
        super().__init__(ladder, **options)
        self.naive = NaiveMlfq(self)
        # Service that jobs had when the ladder became shorter than what they had attained.
        self.excused_s: dict[Job, float] = {}

    def join(self, job: Job, now_s: float) -> None:
        super().join(job, now_s)
        self.naive.join(job, now_s)

    def leave(self, job: Job) -> None:
        super().leave(job)
        self.naive.leave(job)
        self.excused_s.pop(job, None)

    def start(self, job: Job) -> None:
        super().start(job)
        self.naive.start(job)

    def stop(self, job: Job, now_s: float) -> None:
        super().stop(job, now_s)
        self.naive.stop(job, now_s)

    def charge(self, step_s: float) -> Sequence[Job]:
        self._check_transitions(lambda: self.naive.charge(step_s), promotes=False)
        moved = super().charge(step_s)
        for job, record in self.naive.records.items():
            if record.running:
                self.excused_s.pop(job, None)
                left_s = self.naive.left_s(record)
                assert left_s > 0 or record.turn_s == 0.0, f"I3: {job} after its charge"
        return moved

    def promote_starved(self, now_s: float) -> Sequence[Job]:
        self._check_transitions(lambda: self.naive.promote_starved(now_s), promotes=True)
        return super().promote_starved(now_s)

    def set_ladder(self, ladder: QuantumLadder, running: Iterable[Job]) -> None:
        super().set_ladder(ladder, running)
        self.excused_s = {job: record.attained_s for job, record in self.naive.records.items()}

    def stop_ageing(self) -> None:
        """From now on nobody falls due."""
        self.ageing = None
        for job, record in self.naive.records.items():
            record.due_s = record.overdue_s = None
            withdraw(job)

    def compare(self, now_s: float) -> None:
        """What is kept lazily says what looking at everybody says; I2, I3 and turns hold."""
        naive, records = self.naive, self.naive.records
        self.check_integrity(records)
        self.refresh()
        assert sorted(records, key=by_key) == naive.order()
        assert (self.demotions, self.promotions) == (naive.demotions, naive.promotions)
        assert self.turns == naive.turns
        for job, record in records.items():
            assert record.running == (job.state is JobState.RUNNING)
            assert job.level == record.level, f"I2: {job}"
            assert self.attained_service_s(job) == record.attained_s, f"I3: {job}"
            assert self._served_s(job, self._service_s) == record.served_s, f"I3: {job}"
            assert (job.turn_s is None) == (record.turn_s is None), f"I6: {job}"
            allowed_s = max(naive.quantum_s(record), self.excused_s.get(job, 0.0))
            assert record.turn_s is not None or record.attained_s <= allowed_s, f"I3: {job}"
        for priority in {job.priority for job in records}:
            turns = naive.turns_in_class(priority)
            below = sum(job.priority < priority and job.turn_s is not None for job in records)
            # Those above may have taken theirs after.
            assert turns - below <= getattr(self.ageing, "most_turns", turns), "I6"
        due_s = min((r.due_s for r in records.values() if r.due_s is not None), default=math.inf)
        calm_s = min((naive.left_s(r) for r in records.values() if r.running), default=math.inf)
        assert self.calm_s(now_s) == min(calm_s, due_s - now_s)
        overdue = [
            (r.job.priority, r.overdue_s) for r in records.values() if r.overdue_s is not None
        ]
        assert self.overdue_s(now_s) == max(now_s - (min(overdue)[1] if overdue else due_s), 0.0)

    def _check_transitions(self, change, *, promotes: bool) -> None:
        """I2: `change` moves jobs by promotion to level 0 or by demotion of exactly one level.

        A turn changes no level.
        """
        before = {job: record.level for job, record in self.naive.records.items()}
        promotes_at_all = promotes and isinstance(self.ageing, AbsoluteAgeing)
        change()
        for job, level in before.items():
            record = self.naive.records[job]
            if promotes:
                raised = promotes_at_all and record.level == 0 and not record.running
                assert record.level == level or raised, "I2"
            else:
                assert record.level - level in ({0, 1} if record.running else {0}), "I2"


@dataclass
class ReferencePlan:
    """What a walk over all sorted jobs gives, and what it says to each job."""

    batch: list[Job]
    recomputed: list[Job]
    verdicts: dict[Job, Verdict]
    partial: Job | None = None


def reference_plan(jobs: Iterable[Job], limits: StepLimits, demand: object) -> ReferencePlan:
    """Sort everybody, walk from the front; nothing is remembered from one step to the next.

    A job whose KV cache is on the host runs once it is back, and no job without KV cache overtakes
    it meanwhile.
    """
    jobs = list(jobs)
    swapped = [job.key for job in jobs if job.state is JobState.SWAPPED]
    residents = [job for job in jobs if job.state in _RESIDENT]
    runnable = residents + [
        job
        for job in jobs
        if job.state is JobState.QUEUED
        and (demand.holds_kv(job) or not swapped or job.key < min(swapped))
    ]
    if not limits.admit_queued:
        runnable = [job for job in runnable if job.state in _RESIDENT or demand.holds_kv(job)]
    budget = StepBudget(limits, demand, lambda: residents)
    plan = ReferencePlan([], [], {})
    declines = LOOKAHEAD * (limits.batch_limit + 1)
    for job in sorted(runnable, key=by_key):
        verdict = plan.verdicts[job] = budget.admit(job)
        declines -= verdict is Verdict.DECLINED
        if verdict is Verdict.ADMITTED:
            plan.batch.append(job)
        if verdict is Verdict.CLOSED or declines == 0:
            break
    if budget.partial is not None:
        plan.batch.remove(budget.partial)
        plan.batch.append(budget.partial)
        plan.partial = budget.partial
    plan.recomputed = list(budget.victims)
    return plan


_RESIDENT = (JobState.RUNNING, JobState.PAUSED)


@contextmanager
def called_up(
    jobs: Iterable[Job], limits: StepLimits, swap: object, step_s: float
) -> Iterator[list[Job]]:
    """Queue those on the host, for the time being, that a proactive planner is to start at once.

    They have turns, and while everybody who runs waited for the KV cache of one of them, less was
    lost than by a place that is empty for a step.
    """
    jobs, called = list(jobs), []
    running = sum(job.state is JobState.RUNNING for job in jobs)
    swapped = sorted((job for job in jobs if job.state is JobState.SWAPPED), key=by_key)
    for job in swapped if limits.admit_queued and not limits.overlapping else ():
        if job.turn_s is None or running * swap.in_s(job) >= step_s:
            break
        called.append(job)
    for job in called:
        job.state = JobState.QUEUED
    yield called
    for job in called:
        job.state = JobState.SWAPPED


def naive_execute_s(
    ladder: QuantumLadder, jobs: Iterable[Job], level: int, batch_size: int
) -> float:
    """T_execute as the paper writes it: (1/B) * sum over j, sum over i.level > k >= j.level."""
    total_s = 0.0
    for job in jobs:
        for k in range(job.level, level):
            total_s += ladder.quanta_s[k]
    return total_s / batch_size


def naive_enst_s(policy: SkipJoinMlfq, jobs: Iterable[Job], job: Job, batch: int, now_s: float):
    """ENST of the job: now if it has a turn; one that runs without any is not raised."""
    if job.turn_s is not None:
        return 0.0
    execute_s = naive_execute_s(policy.ladder, jobs, job.level, batch)
    if job.state is JobState.RUNNING:
        return execute_s
    if policy.ageing is None:
        return execute_s
    patience_s = naive_patience_s(policy.ageing, policy.ladder.base_s, job, job.served_s)
    return min(max(patience_s - (now_s - job.waiting_since_s), 0.0), execute_s)
