"""Skip-join multi-level feedback queues (section 4.1 of arXiv 2305.05920)."""

import math
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count, islice
from operator import itemgetter

from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.quantum import QuantumLadder

_due = itemgetter(0)


class SkipJoinMlfq:
    """Levels, quanta, demotion, promotion. A `Policy`.

    Every job in the batch is charged the whole step, so attained service is kept on one *service
    clock* that a step moves forward for all of them at once: a running job's demotion falls due
    at a fixed reading of it. A step then costs O(d log B) for the d jobs that it demotes, and
    nothing for the others.

    Args:
        ladder: the quanta.
        skip_join: enter at the level that the prompt's prefill time calls for; otherwise at
            level 0 (the naive MLFQ of the paper's figure 16).
        starvation_limit_s: seconds of waiting after which a job goes to level 0; None: never.
        steady_levels: levels that are open at any load; the ones below take jobs only while more
            than `pressure_jobs` wait, and until then a quantum in the lowest open one is renewed.
            Preempting one long answer for another buys nothing while few wait. None: all.
        pressure_jobs: waiting jobs beyond which the levels below open.
        max_promotions: most promotions at a time, longest wait first; None: no limit. When more
            jobs starve than can be served, promoting them all only swaps the batch over and over.
        promotion_interval: steps from one round of promotions to the next.
    """

    def __init__(
        self,
        ladder: QuantumLadder,
        *,
        skip_join: bool = True,
        starvation_limit_s: float | None = None,
        steady_levels: int | None = None,
        pressure_jobs: int = 0,
        max_promotions: int | None = None,
        promotion_interval: int = 1,
    ) -> None:
        self.ladder = ladder
        self.skip_join = skip_join
        self.starvation_limit_s = starvation_limit_s
        self.pressure_jobs = pressure_jobs
        self.max_promotions = max_promotions
        self.promotion_interval = promotion_interval
        # From here down, levels are kept in arrival order.
        self.arrival_level = min(steady_levels or ladder.num_levels, ladder.num_levels) - 1
        self.demotions = 0
        self.promotions = 0
        self.skip_joins = 0
        self.level_sizes = [0] * ladder.num_levels
        self._service_s = 0.0
        self._rounds = 0
        self._num_jobs = 0
        self._num_running = 0
        # When the quantum of each running job is used up, first one first.
        self._expiries: list[tuple[float, int, Job]] = []
        # Jobs that wait, in the order in which they began to: the clock is monotonic.
        self._waiting: OrderedDict[Job, None] = OrderedDict()
        self._arrivals = count()
        self._entries = count()

    @property
    def num_levels(self) -> int:
        """How many levels a job can be in."""
        return self.ladder.num_levels

    def join(self, job: Job, now_s: float) -> None:
        """Enter the level that skip-join chooses, with no service attained."""
        job.arrival = next(self._arrivals)
        self._num_jobs += 1
        level = self.ladder.join_level(job.first_step_s) if self.skip_join else 0
        self.skip_joins += level > 0
        self.level_sizes[level] += 1
        self._enter(job, level)
        self._wait(job, now_s)

    def leave(self, job: Job) -> None:
        """Forget the job."""
        self._num_jobs -= 1
        self.level_sizes[job.level] -= 1
        self._waiting.pop(job, None)
        self._cancel_expiry(job)

    def start(self, job: Job) -> None:
        """Run the job against what is left of its quantum."""
        self._waiting.pop(job, None)
        self._num_running += 1
        job.running_since_s = self._service_s
        self._schedule_expiry(job)

    def stop(self, job: Job, now_s: float) -> None:
        """Keep the service attained so far; begin to wait."""
        job.attained_service_s += self._service_s - job.running_since_s
        self._cancel_expiry(job)
        self._wait(job, now_s)

    def charge(self, step_s: float) -> Sequence[Job]:
        """Charge a step to every running job; one whose quantum is used up moves down one level."""
        self._service_s += step_s
        demoted = []
        for job in self._pop_expired():
            if self._open_below(job.level):
                self._move(job, job.level + 1)
                self.demotions += 1
                demoted.append(job)
            job.attained_service_s = 0.0
            job.running_since_s = self._service_s
            self._schedule_expiry(job)
        return demoted

    def promote_starved(self, now_s: float, steps: int = 1) -> Sequence[Job]:
        """Move every job that has waited for the starvation limit to level 0.

        Not so a job without KV cache whose first step takes half the limit or longer: on a device
        too small for two such prompts, each would be promoted past the other while that one still
        prefills, and take its memory, for ever. The finite ladder serves them in turn.
        """
        self._rounds += steps
        if self.starvation_limit_s is None or self._rounds % self.promotion_interval:
            return ()
        promoted: list[Job] = []
        while self._waiting and len(promoted) != self.max_promotions:
            job = next(iter(self._waiting))
            if now_s - job.waiting_since_s < self.starvation_limit_s:
                break
            del self._waiting[job]
            endless = job.state is JobState.QUEUED and (
                2 * job.first_step_s >= self.starvation_limit_s
            )
            if job.level > 0 and not endless:
                self._move(job, 0)
                self.promotions += 1
                promoted.append(job)
        return promoted

    def calm_s(self, now_s: float) -> float:
        """Until the first quantum is used up, or the first promotion falls due."""
        calm_s = self._expiries[0][0] - self._service_s if self._expiries else math.inf
        if self.starvation_limit_s is not None and self._waiting:
            since_s = next(iter(self._waiting)).waiting_since_s
            calm_s = min(calm_s, since_s + self.starvation_limit_s - now_s)
        return calm_s

    def execute_s(self, batch_size: int) -> Sequence[float]:
        """T_execute of the paper's section 4.2, for a job of each level.

        It is (1/B) times the sum, over the jobs j of higher levels, of the quanta from j's level to
        the one above its own. Jobs of the same level count for nothing.
        """
        times, total_s, above = [], 0.0, 0
        for jobs, quantum_s in zip(self.level_sizes, self.ladder.quanta_s, strict=True):
            times.append(total_s)
            above += jobs
            if above:
                total_s += quantum_s * above / batch_size
        return times

    def promote_s(self, job: Job, now_s: float) -> float:
        """T_promote of the paper's section 4.2; infinite without starvation prevention."""
        if self.starvation_limit_s is None:
            return math.inf
        return max(self.starvation_limit_s - (now_s - job.waiting_since_s), 0.0)

    def next_promoted(self, limit: int) -> Sequence[Job]:
        """The jobs that have waited longest, in the order in which they began to."""
        return () if self.starvation_limit_s is None else list(islice(self._waiting, limit))

    def turn_s(self, job: Job) -> float:
        """What is left of its quantum."""
        return self.ladder.quanta_s[job.level] - self.attained_service_s(job)

    def attained_service_s(self, job: Job) -> float:
        """Seconds of service in the job's current level, up to the last step charged."""
        if job.state is JobState.RUNNING:
            return job.attained_service_s + self._service_s - job.running_since_s
        return job.attained_service_s

    def set_ladder(self, ladder: QuantumLadder, running: Iterable[Job]) -> None:
        """Replace the quanta, for instance when a shorter step was seen.

        Raises:
            ValueError: the number of levels differs.
        """
        if ladder.num_levels != self.ladder.num_levels:
            raise ValueError(
                f"the ladder has {self.ladder.num_levels} levels, got {ladder.num_levels}"
            )
        self.ladder = ladder
        self._expiries = []
        for job in running:
            self._schedule_expiry(job)

    def check_integrity(self, jobs: Iterable[Job]) -> None:
        """Laws I1 and I3 over `jobs`, all that are known here.

        Raises:
            AssertionError: naming the law.
        """
        sizes = [0] * self.num_levels
        for job in jobs:
            sizes[job.level] += 1
            assert (job in self._waiting) <= (job.state is not JobState.RUNNING), f"I1: {job}"
            assert self.attained_service_s(job) >= -1e-6, f"I3: {job}"
        assert sizes == self.level_sizes, f"I1: {sizes} jobs by level, counted {self.level_sizes}"

    def _pop_expired(self) -> list[Job]:
        """The running jobs whose quantum is used up, each once however short its quantum is."""
        due = bisect_right(self._expiries, self._service_s, key=_due)
        expired = [entry[2] for entry in self._expiries[:due]]
        del self._expiries[:due]
        return expired

    def _open_below(self, level: int) -> bool:
        """Whether a job may leave `level` downwards now."""
        waiting = self._num_jobs - self._num_running
        return level < self.arrival_level or waiting > self.pressure_jobs

    def _move(self, job: Job, level: int) -> None:
        self.level_sizes[job.level] -= 1
        self.level_sizes[level] += 1
        self._enter(job, level)

    def _enter(self, job: Job, level: int) -> None:
        """Queue at the tail of `level`; the deepest ones are kept in arrival order instead."""
        job.level = level
        job.attained_service_s = 0.0
        place = job.arrival if level >= self.arrival_level else next(self._entries)
        job.key = (job.priority, level, place)

    def _schedule_expiry(self, job: Job) -> None:
        left_s = self.ladder.quanta_s[job.level] - job.attained_service_s
        job.expiry = (job.running_since_s + left_s, job.arrival, job)
        insort(self._expiries, job.expiry)

    def _cancel_expiry(self, job: Job) -> None:
        if job.expiry is None:
            return
        del self._expiries[bisect_left(self._expiries, job.expiry)]
        job.expiry = None
        self._num_running -= 1

    def _wait(self, job: Job, now_s: float) -> None:
        job.waiting_since_s = now_s
        self._waiting[job] = None
