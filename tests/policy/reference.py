"""What the policy is checked against: the same laws, written the slow and obvious way."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from fastserve_vllm.policy.budget import StepBudget, StepLimits, Verdict
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder
from fastserve_vllm.policy.walk import LOOKAHEAD

by_key = attrgetter("key")


@dataclass(eq=False)
class Record:
    """A job as the naive policy sees it."""

    priority: int
    arrival: int
    level: int = 0
    place: int = 0
    attained_s: float = 0.0
    running: bool = False
    waiting_since_s: float = 0.0
    wait_number: int = 0


class NaiveMlfq:
    """Charges every running job in every step, and scans every job for everything else."""

    def __init__(self, policy: SkipJoinMlfq) -> None:
        self.policy = policy
        self.records: dict[Job, Record] = {}
        self.arrivals = self.entries = self.waits = 0
        self.demotions = self.promotions = 0

    @property
    def ladder(self) -> QuantumLadder:
        return self.policy.ladder

    def order(self) -> list[Job]:
        """All jobs, first to run first."""
        keys = {job: (r.priority, r.level, r.place) for job, r in self.records.items()}
        return sorted(keys, key=keys.get)

    def join(self, job: Job, now_s: float) -> None:
        record = self.records[job] = Record(job.priority, self.arrivals)
        self.arrivals += 1
        level = 0
        while self.policy.skip_join and self.ladder.quanta_s[level] < job.first_step_s:
            level += 1
        self._enter(record, level)
        self._wait(record, now_s)

    def leave(self, job: Job) -> None:
        del self.records[job]

    def start(self, job: Job) -> None:
        self.records[job].running = True

    def stop(self, job: Job, now_s: float) -> None:
        self.records[job].running = False
        self._wait(self.records[job], now_s)

    def charge(self, step_s: float) -> None:
        due = []
        for record in self.records.values():
            quantum_s = self.ladder.quanta_s[record.level]
            if record.running:
                record.attained_s += step_s
                if record.attained_s >= quantum_s:
                    due.append((quantum_s - record.attained_s, record.arrival, record))
        waiting = sum(not record.running for record in self.records.values())
        for _, _, record in sorted(due):
            if record.level < self.policy.arrival_level or waiting > self.policy.pressure_jobs:
                self._enter(record, record.level + 1)
                self.demotions += 1
            record.attained_s = 0.0

    def promote_starved(self, now_s: float) -> None:
        limit_s, allowed = self.policy.starvation_limit_s, self.policy.max_promotions
        starved = [
            record
            for job, record in self.records.items()
            if not record.running
            and record.level > 0
            and limit_s is not None
            and now_s - record.waiting_since_s >= limit_s
            and (job.state is not JobState.QUEUED or 2 * job.first_step_s < limit_s)
        ]
        for record in sorted(starved, key=attrgetter("wait_number"))[:allowed]:
            self._enter(record, 0)
            self.promotions += 1

    def _enter(self, record: Record, level: int) -> None:
        record.level, record.attained_s = level, 0.0
        record.place = record.arrival
        if level < self.policy.arrival_level:
            self.entries += 1
            record.place = self.entries

    def _wait(self, record: Record, now_s: float) -> None:
        self.waits += 1
        record.waiting_since_s, record.wait_number = now_s, self.waits


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
        demoted = super().charge(step_s)
        for job, record in self.naive.records.items():
            if record.running:
                self.excused_s.pop(job, None)
                quantum_s = self.ladder.quanta_s[record.level]
                assert record.attained_s < quantum_s, f"I3: {job} after its charge"
        return demoted

    def promote_starved(self, now_s: float) -> Sequence[Job]:
        self._check_transitions(lambda: self.naive.promote_starved(now_s), promotes=True)
        return super().promote_starved(now_s)

    def set_ladder(self, ladder: QuantumLadder, running: Iterable[Job]) -> None:
        super().set_ladder(ladder, running)
        self.excused_s = {job: record.attained_s for job, record in self.naive.records.items()}

    def compare(self) -> None:
        """The lazily charged clock says what charging everybody says; I2 and I3 hold."""
        records = self.naive.records
        self.check_integrity(records)
        assert sorted(records, key=by_key) == self.naive.order()
        assert (self.demotions, self.promotions) == (self.naive.demotions, self.naive.promotions)
        for job, record in records.items():
            assert record.running == (job.state is JobState.RUNNING)
            assert job.level == record.level, f"I2: {job}"
            assert self.attained_service_s(job) == record.attained_s, f"I3: {job}"
            allowed_s = max(self.ladder.quanta_s[job.level], self.excused_s.get(job, 0.0))
            assert record.attained_s <= allowed_s, f"I3: {job}"

    def _check_transitions(self, change, *, promotes: bool) -> None:
        """I2: `change` moves jobs by promotion to level 0 or by demotion of exactly one level."""
        before = {job: record.level for job, record in self.naive.records.items()}
        change()
        for job, level in before.items():
            record = self.naive.records[job]
            if promotes:
                assert record.level == level or (record.level == 0 and not record.running), "I2"
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
    """ENST of the job; one that runs is not promoted."""
    execute_s = naive_execute_s(policy.ladder, jobs, job.level, batch)
    if job.state is JobState.RUNNING or policy.starvation_limit_s is None:
        return execute_s
    return min(max(policy.starvation_limit_s - (now_s - job.waiting_since_s), 0.0), execute_s)
