"""What a step has to give away, and the job-by-job decision of who gets it."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from fastserve_vllm.policy.job import Job, JobState, OrderKey, by_key
from fastserve_vllm.policy.step_time import StepTimeModel

_LEAST_CHUNK = 128
# Steps of growth that are kept free of who comes back, who would leave at once. Twice as many would
# leave another twentieth of a small device idle.
_GROWTH_STEPS = 16


class Demand(Protocol):
    """What the host alone knows of a job. But for `holds_kv`, asked only where a limit binds."""

    def unready(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of the jobs that have nothing to compute which is not already in flight."""
        ...

    def new_blocks(self, job: Job) -> int:
        """Device blocks that its next step needs beyond those it holds."""
        ...

    def freed_blocks(self, job: Job) -> int | None:
        """Device blocks that giving up its KV cache frees at once; None: not possible now."""
        ...

    def adapter(self, job: Job) -> int:
        """Id of its LoRA adapter, 0 for none."""
        ...

    def holds_kv(self, job: Job) -> bool:
        """Whether the job has KV cache on the device, in the batch or not.

        Asked of queued jobs: one whose KV cache was loaded there needs little to run, and nobody
        can take its blocks, so it may pass those that wait for memory.
        """
        ...


@dataclass(slots=True)
class StepLimits:
    """The room that one step has.

    Attributes:
        batch_limit: jobs in the batch.
        token_budget: tokens computed.
        decode_tokens: tokens that a decode computes; a job that wants more is in prefill.
        prefill_chunk: most tokens that one prefill may compute.
        chunked_prefill: whether a prefill may take less than it wants.
        free_blocks: device blocks that nobody holds.
        block_bound: most new blocks that any decode can need.
        block_tokens: fewest tokens that one more block holds.
        headroom_blocks: blocks that must stay free when a queued job is let in beside others.
        occupied: whether any job holds KV cache on the device.
        free_slots: model-runner slots that nobody holds; None where pausing keeps no slot.
        max_adapters: distinct LoRA adapters in a step; None: adapters are not in use.
        overlapping: steps overlap, so a running job may have nothing left to schedule.
        admit_queued: whether jobs without KV cache may start at all.
    """

    batch_limit: int
    token_budget: int
    decode_tokens: int = 1
    prefill_chunk: int = 1 << 62
    chunked_prefill: bool = True
    free_blocks: int = 1 << 62
    block_bound: int = 1
    block_tokens: int = 16
    headroom_blocks: int = 0
    occupied: bool = True
    free_slots: int | None = None
    max_adapters: int | None = None
    overlapping: bool = False
    admit_queued: bool = True

    def bounds(self, batch: Collection[Job], joined: Sequence[Job]) -> tuple[int, int]:
        """Tokens and blocks that the whole batch cannot exceed: sums that overestimate its needs.

        Args:
            batch: the jobs that would run.
            joined: those of them that did not run before.
        """
        tokens = len(batch) * self.decode_tokens
        blocks = len(batch) * self.block_bound + self.headroom_blocks
        for job in [job for job in joined if job.state is JobState.QUEUED]:
            # Cached tokens are not computed again, but their blocks may be among the free ones.
            cached = max(job.prompt_tokens - job.next_tokens, 0)
            blocks += self.block_bound * (cached // self.block_tokens + 1)
            blocks += self.block_bound * (job.swapped_tokens // self.block_tokens + 1)
        for wanted in [job.next_tokens for job in batch if job.next_tokens > self.decode_tokens]:
            tokens += wanted
            blocks += self.block_bound * (wanted // self.block_tokens + 1)
        return tokens, blocks

    def blocks_for(self, batch: Iterable[Job], joined: Iterable[Job], demand: Demand) -> int:
        """Blocks that the whole batch needs, those included that must stay free for a start."""
        blocks = sum([demand.new_blocks(job) for job in batch])
        starts = any(job.state is JobState.QUEUED for job in joined)
        return blocks + (self.headroom_blocks if starts else 0)

    def growth(self, batch_size: int) -> int:
        """Blocks that so many decodes ask for soon, one each at most: no room to come back to."""
        tokens = min(self.decode_tokens * _GROWTH_STEPS, self.block_tokens)
        return batch_size * tokens // self.block_tokens

    def hold(self, tokens: int, blocks: int, joined: Sequence[Job]) -> bool:
        """Whether a batch within these bounds fits for certain."""
        if self.max_adapters is not None:
            return False
        if self.free_slots is not None:
            queued = [job for job in joined if job.state is JobState.QUEUED]
            if len(queued) > self.free_slots:
                return False
        return tokens <= self.token_budget and blocks <= self.free_blocks


def token_budget(
    step_time: StepTimeModel, gap_s: float, most_tokens: int, decode_tokens: int
) -> int:
    """Tokens of a step that leaves those who decode within their gap bound.

    A prefill may take half of the bound: the other half is for waiting. A step always has room for
    a token of each job of the batch, and for a chunk that is worth a step of its own.

    Args:
        step_time: what computing tokens costs.
        gap_s: bound of the gap between two tokens; infinite: none.
        most_tokens: the engine's own limit.
        decode_tokens: tokens that a full batch decodes.
    """
    within = step_time.prefill_tokens_within(gap_s / 2)
    return min(most_tokens, max(within, decode_tokens + _LEAST_CHUNK))


class Verdict(Enum):
    """What became of a job that asked for a place in the step.

    `SKIPPED` jobs cost the step nothing: they have nothing to compute, or stand in the queue
    behind one that was turned away. `DECLINED` ones met a limit. `CLOSED` ends the walk.
    """

    ADMITTED = "admitted"
    SKIPPED = "skipped"
    DECLINED = "declined"
    CLOSED = "closed"


@dataclass(slots=True)
class StepBudget:
    """What is left of a step while jobs are admitted in the total order.

    A job is admitted whole or changes nothing. Where blocks or slots run short, the job that
    would run last gives up its KV cache; never one that stands before the job that asks.

    Args:
        limits: the room of the step.
        demand: the host's answers.
        residents: lists the jobs that hold KV cache. Called once at most, and only when memory is
            short: then the step costs O(R log R) more for R such jobs, who are as many as the
            device holds, however long the queue is.
    """

    limits: StepLimits
    demand: Demand
    residents: Callable[[], Iterable[Job]]
    victims: dict[Job, None] = field(default_factory=dict)
    declined: dict[str, int] = field(default_factory=dict)
    partial: Job | None = None
    _admitted: int = 0
    _tokens: int = 0
    _blocks: int = 0
    _slots: int = 0
    _adapters: set[int] = field(default_factory=set)
    _queued_closed: bool = False
    _queued_admitted: bool = False
    _headroom_kept: bool = False
    _tail: list[Job] | None = None
    _first_victim: OrderKey | None = None

    def __post_init__(self) -> None:
        self._tokens = self.limits.token_budget
        self._blocks = self.limits.free_blocks
        self._slots = self.limits.free_slots or 0

    @property
    def blocks_left(self) -> int:
        """Device blocks that the admitted jobs leave."""
        return self._blocks

    @property
    def takes_queued(self) -> bool:
        """Whether a job without KV cache could still be admitted."""
        return self.partial is None and not self._queued_closed

    def takes(self, job: Job) -> bool:
        """Whether this queued job could still be admitted if it has no KV cache."""
        behind = self._first_victim is not None and job.key > self._first_victim
        return self.takes_queued and not behind

    def _turns_away(self, job: Job) -> bool:
        """Whether the queued job stands behind one that it must not overtake."""
        if self.takes(job):
            return False
        return self.partial is not None or not self.demand.holds_kv(job)

    def admit(self, job: Job) -> Verdict:
        """Give the job its share of the step, or say why not."""
        if self._admitted == self.limits.batch_limit or self._tokens <= 0:
            return Verdict.CLOSED
        queued = job.state is JobState.QUEUED
        if job in self.victims or (queued and self._turns_away(job)):
            return Verdict.SKIPPED
        if self.limits.overlapping and self.demand.unready((job,)):
            return Verdict.SKIPPED
        tokens = self._token_share(job, queued)
        reason = self._obstacle(job, queued, tokens)
        if reason is not None:
            self.declined[reason] = self.declined.get(reason, 0) + 1
            return Verdict.DECLINED
        self._take(job, queued, tokens)
        return Verdict.ADMITTED

    def _token_share(self, job: Job, queued: bool) -> int:
        """Tokens the job gets; 0: none.

        The host serves running jobs before queued ones, so a running prefill that does not get
        all that it wants would take tokens from a queued job ahead of it: it must sit out. The
        one prefill that gets the rest leaves a token to each decode that follows.
        """
        limits = self.limits
        wanted = min(job.next_tokens, limits.prefill_chunk)
        if wanted <= self._tokens and (self.partial is None or wanted <= limits.decode_tokens):
            return wanted
        if wanted <= limits.decode_tokens or self.partial is not None:
            return 0
        if not limits.chunked_prefill or (self._queued_admitted and not queued):
            return 0
        return 1

    def _obstacle(self, job: Job, queued: bool, tokens: int) -> str | None:
        """The first limit that keeps the job out; None once room has been made for it."""
        if tokens == 0:
            return "tokens"
        adapter = self.demand.adapter(job) if self.limits.max_adapters is not None else 0
        full = self.limits.max_adapters is not None and (
            len(self._adapters) >= self.limits.max_adapters
        )
        if adapter and full and adapter not in self._adapters:
            return "adapters"
        blocks = self.demand.new_blocks(job)
        needs_headroom = self._needs_headroom(queued)
        if needs_headroom:
            blocks += self.limits.headroom_blocks
        slots = int(queued and self.limits.free_slots is not None)
        if not self._make_room(job, blocks, slots):
            # No prefill may overtake: it would take the memory that this job waits for.
            self._queued_closed |= queued
            return "memory"
        if adapter:
            self._adapters.add(adapter)
        self._headroom_kept |= needs_headroom
        self._blocks -= blocks
        self._slots -= slots
        return None

    def _needs_headroom(self, queued: bool) -> bool:
        """Set aside once: those admitted after it cannot touch it any more.

        Who starts alone needs none, as in vLLM: a job nearly as large as the device would never
        start.
        """
        beside = self.limits.occupied or self._admitted > 0
        return queued and beside and not self._headroom_kept

    def _make_room(self, job: Job, blocks: int, slots: int) -> bool:
        """Take KV cache from the tail of the order until the job fits, or leave all as it was."""
        free, free_slots = self._blocks, self._slots
        if blocks <= free and slots <= free_slots:
            return True
        if self._tail is None:
            self._tail = sorted(self.residents(), key=by_key)
        end = len(self._tail)
        taken: list[Job] = []
        while blocks > free or slots > free_slots:
            end -= 1
            if end < 0 or self._tail[end].key <= job.key:
                return False
            victim = self._tail[end]
            freed = self.demand.freed_blocks(victim)
            if freed is not None:
                taken.append(victim)
                free += freed
                free_slots += 1
        del self._tail[end:]
        self._blocks, self._slots = free, free_slots
        self.victims.update(dict.fromkeys(taken))
        # Whoever stands behind a victim and holds nothing yet does not get its memory.
        self._first_victim = taken[-1].key
        return True

    def _take(self, job: Job, queued: bool, tokens: int) -> None:
        self._admitted += 1
        self._tokens -= tokens
        self._queued_admitted |= queued
        if tokens < min(job.next_tokens, self.limits.prefill_chunk):
            self.partial = job
