"""Skip-join multi-level feedback queues (section 4.1 of arXiv 2305.05920)."""

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from itertools import count

from fastserve_vllm.policy.ageing import Ageing, DueQueue, RelativeAgeing, withdraw
from fastserve_vllm.policy.expiries import Expiries
from fastserve_vllm.policy.first_tokens import FirstTokenShare
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.lengths import AnswerLengths
from fastserve_vllm.policy.quantum import QuantumLadder

# What has a turn stands above all levels of its priority class.
_TURN_LEVEL = -1
# Places in the last level are seconds, told apart to the microsecond.
_PLACE_DIGITS = 6


class SkipJoinMlfq:
    """Levels, quanta, demotion, ageing. A `Policy`.

    Every job in the batch is charged the whole step, so attained service is kept on one *service
    clock* that a step moves forward for all of them at once: a running job's demotion falls due
    at a fixed reading of it. A step then costs O(d log B) for the d jobs that it demotes, and
    nothing for the others.

    The last level has no quantum. It is served by age, where a second of attained service counts
    as `service_weight` seconds of age: who has got far is likely to be done soon, for answers have
    a typical length; so does service that its answer is expected to be shorter by. Weight 0 is
    arrival order.

    Args:
        ladder: the quanta.
        skip_join: enter at the level that the prompt's prefill time calls for, above the last one
            in any case; otherwise at level 0 (the naive MLFQ of the paper's figure 16).
        ageing: what becomes of jobs that wait long; None: nothing.
        service_weight: seconds of age that a second of service counts for in the last level.
        lengths: learns from the answers that end, for the last level; None: all are alike.
        first_tokens: with skip-join, who has no room there joins the last level.
    """

    def __init__(
        self,
        ladder: QuantumLadder,
        *,
        skip_join: bool = True,
        ageing: Ageing | None = None,
        service_weight: float = 0.0,
        lengths: AnswerLengths | None = None,
        first_tokens: FirstTokenShare | None = None,
    ) -> None:
        self.skip_join = skip_join
        self.ageing = ageing
        self._set_ladder(ladder)
        self.service_weight = service_weight
        self.lengths = lengths
        self.first_tokens = first_tokens
        self.demotions = 0
        self.level_demotions = [0] * ladder.num_levels
        self.promotions = 0
        self.turns = 0
        self.late_turns = 0
        self.skip_joins = 0
        self.level_sizes = [0] * ladder.num_levels
        self._service_s = 0.0
        # The reading of the service clock at which running jobs' keys are right.
        self._keys_at_s = 0.0
        # Priority classes of the jobs that have a turn, in order.
        self._turn_classes: list[int] = []
        # When the quantum or the turn of each running job is used up.
        self._expiries = Expiries()
        # Who may fall due, by when; who is due, by priority class and since when.
        self._waiting = DueQueue()
        self._overdue = DueQueue()
        self._arrivals = count()
        self._entries = count()

    @property
    def num_levels(self) -> int:
        """How many levels a job can be in."""
        return self.ladder.num_levels

    @property
    def gap_s(self) -> float:
        """The bound that relative ageing sets to the gap between two tokens; else infinite."""
        return self._first_due_s if isinstance(self.ageing, RelativeAgeing) else math.inf

    def overdue_s(self, now_s: float) -> float:
        """For how long the first job due has been; 0 where none is."""
        due_s = self._overdue.due_s if len(self._overdue) else self._waiting.due_s
        return max(now_s - due_s, 0.0)

    def join(self, job: Job, now_s: float) -> None:
        """Enter the level that skip-join chooses, with no service attained."""
        job.arrival = next(self._arrivals)
        job.joined_s = now_s
        job.served_s = 0.0
        level = self._join_level(job, now_s) if self.skip_join else 0
        self.skip_joins += level > 0
        self.level_sizes[level] += 1
        self._enter(job, level)
        if self.skip_join:
            # A prompt that takes longer than any quantum is not demoted before its first token.
            job.grace_s = max(job.first_step_s - self.ladder.quanta_s[level], 0.0)
        self._wait(job, now_s)

    def leave(self, job: Job) -> None:
        """Forget the job, but for how long its answer was, however it ended."""
        if self.lengths is not None:
            running = job.state is JobState.RUNNING
            served_s = self._served_s(job, self._service_s)
            self.lengths.end(job.prompt_tokens, served_s, running=running)
        self.level_sizes[job.level] -= 1
        withdraw(job)
        self._expiries.discard(job)
        if job.turn_s is not None:
            self._give_back_turn(job)

    def start(self, job: Job) -> None:
        """Run the job against what is left of its quantum, or of its turn."""
        withdraw(job)
        job.running_since_s = self._service_s
        if job.turn_s is not None:
            prefills = job.state is JobState.QUEUED
            job.turn_s = job.first_step_s if prefills else 0.0
            job.turn_tokens = job.next_tokens if prefills else 0
        self._schedule_expiry(job)

    def stop(self, job: Job, now_s: float) -> None:
        """Keep the service attained so far; begin to wait."""
        self._settle(job)
        self._expiries.discard(job)
        job.key = self.key_among_waiting(job)
        self._wait(job, now_s)

    def charge(self, step_s: float) -> Sequence[Job]:
        """Charge a step to every running job; one whose quantum is used up moves down one level.

        One whose turn ends returns to its place, and moves down if that was its quantum, too.
        """
        self._service_s += step_s
        if self.lengths is not None:
            self.lengths.charge(step_s)
        moved = []
        for job in self._expiries.pop_due(self._service_s):
            self._settle(job)
            # By the clock, not by what was attained: sums of that may fall short by rounding.
            used_up = job.turn_s is None
            if job.turn_s is not None and not self._extend_turn(job):
                self._give_back_turn(job)
                job.key = self._key(job, self._keys_at_s)
                moved.append(job)
                used_up = job.attained_service_s >= self._quantum_s(job)
            if used_up:
                if job.level < self.ladder.last_level:
                    self.level_demotions[job.level] += 1
                    self._move(job, job.level + 1)
                    self.demotions += 1
                    moved.append(job)
                job.attained_service_s = 0.0
            self._schedule_expiry(job)
        return moved

    def refresh(self) -> bool:
        """In the last level, running makes older: those who run gain on those who wait."""
        if self._keys_at_s == self._service_s:
            return False
        self._keys_at_s = self._service_s
        if not self.service_weight:
            return False
        found = False
        # Nothing else is without end.
        for job in self._expiries.endless():
            found = True
            job.key = self._key(job, self._service_s)
        return found

    def key_among_running(self, job: Job) -> tuple[float, ...]:
        """All running jobs of the last level gain alike: one that joins them loses the gain."""
        key = job.key
        if key[1] != self.ladder.last_level:
            return key
        gain_s = self._service_s - self._keys_at_s
        return (key[0], key[1], key[2] + self.service_weight * gain_s, key[3])

    def key_among_waiting(self, job: Job) -> tuple[float, ...]:
        """In the last level, by age and all service up to now."""
        if job.key[1] != self.ladder.last_level:
            return job.key
        return self._key(job, self._service_s)

    def promote_starved(self, now_s: float) -> Sequence[Job]:
        """Raise who has waited for long: to a turn, or by the absolute rule to level 0."""
        if isinstance(self.ageing, RelativeAgeing):
            return self._give_turns(self.ageing, now_s)
        raised: list[Job] = []
        while (job := self._waiting.first_due(now_s)) is not None:
            withdraw(job)
            if job.level > 0 and self.ageing is not None and self.ageing.raises(job):
                self._move(job, 0)
                self.promotions += 1
                raised.append(job)
        return raised

    def calm_s(self, now_s: float) -> float:
        """Until the first quantum is used up, or the first waiting job falls due."""
        return min(self._expiries.first_s - self._service_s, self._waiting.due_s - now_s)

    def execute_s(self, batch_size: int) -> Sequence[float]:
        """T_execute of the paper's section 4.2, for a job of each level."""
        return self.ladder.execute_s(self.level_sizes, batch_size)

    def promote_s(self, job: Job, now_s: float) -> float:
        """T_promote of the paper's section 4.2; infinite without ageing."""
        if job.turn_s is not None:
            return 0.0
        if self.ageing is None:
            return math.inf
        served_s = self._served_s(job, self._service_s)
        patience_s = self.ageing.patience_s(job, self.ladder.base_s, served_s)
        return max(patience_s - (now_s - job.waiting_since_s), 0.0)

    def next_promoted(self, limit: int) -> Sequence[Job]:
        """The jobs that fall due first."""
        due = self._overdue.next(limit)
        return [*due, *self._waiting.next(limit - len(due))]

    def turn_left_s(self, job: Job) -> float:
        """What is left of its quantum; one that has a turn is owed it, whatever it costs."""
        if job.turn_s is not None:
            return math.inf
        return self._quantum_s(job) - self.attained_service_s(job)

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
        self._set_ladder(ladder)
        self._expiries.clear()
        for job in running:
            self._schedule_expiry(job)

    def check_integrity(self, jobs: Iterable[Job]) -> None:
        """Laws I1 and I3 over `jobs`, all that are known here.

        Raises:
            AssertionError: naming the law.
        """
        sizes, turns = [0] * self.num_levels, 0
        for job in jobs:
            sizes[job.level] += 1
            turns += job.turn_s is not None
            assert (job.due is not None) <= (job.state is not JobState.RUNNING), f"I1: {job}"
            assert (job.key[1] == _TURN_LEVEL) == (job.turn_s is not None), f"I1: {job}"
            assert self.attained_service_s(job) >= -1e-6, f"I3: {job}"
        assert sizes == self.level_sizes, f"I1: {sizes} jobs by level, counted {self.level_sizes}"
        assert turns == len(self._turn_classes), f"I1: {turns} jobs have a turn"

    # ---- levels -------------------------------------------------------------------------------

    def _set_ladder(self, ladder: QuantumLadder) -> None:
        self.ladder = ladder
        # The shortest that anybody waits before falling due.
        self._first_due_s = math.inf
        if self.ageing is not None:
            self._first_due_s = self.ageing.first_due_s(ladder.base_s)

    def _join_level(self, job: Job, now_s: float) -> int:
        """Above the last level, unless first tokens have had their share of the time."""
        bucket, last = self.first_tokens, self.ladder.last_level
        if bucket is not None:
            # A first step no longer than a decode step of a full batch holds nobody up.
            hold_up_s = max(job.first_step_s - self.ladder.base_s, 0.0)
            if not bucket.takes(hold_up_s, now_s, self.gap_s):
                return last
        return min(self.ladder.join_level(job.first_step_s), max(last - 1, 0))

    def _quantum_s(self, job: Job) -> float:
        return self.ladder.quanta_s[job.level] + job.grace_s

    def _move(self, job: Job, level: int) -> None:
        self.level_sizes[job.level] -= 1
        self.level_sizes[level] += 1
        self._enter(job, level)

    def _enter(self, job: Job, level: int) -> None:
        """Queue at the tail of `level`; in the last one, where age and service say."""
        job.level = level
        job.attained_service_s = job.grace_s = 0.0
        job.entry = next(self._entries)
        if self.lengths is not None and level == self.ladder.last_level:
            job.longer_s = self.lengths.longer_s(job.prompt_tokens)
        if job.turn_s is None:
            job.key = self._key(job, self._keys_at_s)

    def _key(self, job: Job, reading_s: float) -> tuple[float, ...]:
        """The job's key without a turn; if it runs, at this reading of the service clock."""
        place: float = job.entry
        if job.level == self.ladder.last_level:
            # Coarse enough to hide that sums of times are not exact. Otherwise
            # `key_among_running` might exchange two jobs that came and were served together.
            ahead_s = self._served_s(job, reading_s) - job.longer_s
            place = round(job.joined_s - self.service_weight * ahead_s, _PLACE_DIGITS)
        return (job.priority, job.level, place, job.arrival)

    # ---- service ------------------------------------------------------------------------------

    @staticmethod
    def _served_s(job: Job, reading_s: float) -> float:
        """Service attained in the job's life, at this reading of the service clock."""
        if job.state is JobState.RUNNING:
            return job.served_s + reading_s - job.running_since_s
        return job.served_s

    def _settle(self, job: Job) -> None:
        """Book the running job's service up to now."""
        seconds = self._service_s - job.running_since_s
        job.attained_service_s += seconds
        job.served_s += seconds
        job.running_since_s = self._service_s

    def _schedule_expiry(self, job: Job) -> None:
        left_s = job.turn_s
        if left_s is None:
            left_s = self._quantum_s(job) - job.attained_service_s
        self._expiries.add(job, job.running_since_s + left_s)

    # ---- ageing -------------------------------------------------------------------------------

    def _wait(self, job: Job, now_s: float) -> None:
        job.waiting_since_s = now_s
        if self.ageing is not None and job.turn_s is None:
            self._waiting.push(job, now_s + self._first_due_s)

    def _give_turns(self, ageing: RelativeAgeing, now_s: float) -> list[Job]:
        """Give those who are due a turn, as far as turns reach.

        The more urgent class goes first, and the turns of those below it are none of its business:
        they may be unable to run because of it. In a class, longest overdue is first.
        """
        raised: list[Job] = []
        while (job := self._waiting.first_due(now_s)) is not None:
            due_s = self._due_s(ageing, job)
            if due_s > now_s:
                self._waiting.push(job, due_s)
            else:
                self._overdue.push(job, job.priority, due_s)
        while len(self._overdue) and (job := self._overdue.first()) is not None:
            if bisect_right(self._turn_classes, job.priority) >= ageing.most_turns:
                break
            # Its KV cache may have left the device since.
            due_s = self._due_s(ageing, job)
            if due_s > now_s:
                self._waiting.push(job, due_s)
                continue
            withdraw(job)
            self.turns += 1
            # In time, it would have come in the step after it fell due.
            self.late_turns += now_s - due_s > self._first_due_s
            insort(self._turn_classes, job.priority)
            job.turn_s = 0.0
            job.key = (job.priority, _TURN_LEVEL, next(self._entries), job.arrival)
            raised.append(job)
        return raised

    @staticmethod
    def _extend_turn(job: Job) -> bool:
        """Give the job one more step where it may not have had its first token yet.

        Predictions err. Where only one of two prompts fits and both turns end too early, neither
        gets anywhere, for ever. What is left of a prefill shrinks with every step, a decode is
        always as long: so the turn ends once a step has left as much to compute as was before.
        """
        before, job.turn_tokens = job.turn_tokens, job.next_tokens
        if job.next_tokens >= before:
            return False
        job.turn_s = 0.0
        return True

    def _due_s(self, ageing: RelativeAgeing, job: Job) -> float:
        patience_s = ageing.patience_s(job, self.ladder.base_s, job.served_s)
        return job.waiting_since_s + patience_s

    def _give_back_turn(self, job: Job) -> None:
        del self._turn_classes[bisect_left(self._turn_classes, job.priority)]
        job.turn_s = None
