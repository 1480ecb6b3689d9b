"""The simulated device's and host's KV blocks: counted, not copied."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.step_time import StepTimeModel
from fastserve_vllm.simulator.copies import Copy, CopyChannels
from fastserve_vllm.simulator.free_blocks import FreeBlocks, Freed
from fastserve_vllm.traces import Request


class HostState(Enum):
    """What the host's copy of a request is; as in the swap manager of the live engine."""

    NONE = "none"
    RETAINED = "retained"
    SAVING = "saving"
    MOVING = "moving"
    SWAPPED = "swapped"


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A live request: its tokens and its KV cache.

    Attributes:
        computed: tokens whose KV is on the device.
        blocks: device blocks.
        entered: whether it has run since it last came onto the device.
        host_tokens, host_blocks: what the host's copy covers and takes.
    """

    request: Request
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    entered: bool = False
    host: HostState = HostState.NONE
    host_tokens: int = 0
    host_blocks: int = 0
    left_before: bool = False
    first_token_s: float = -1.0
    last_token_s: float = -1.0
    longest_gap_s: float = 0.0
    freed: Freed | None = None
    """Its full blocks that were freed and may hold its KV still."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return self.request.prompt_tokens + self.generated


@dataclass(slots=True)
class CopyCounters:
    """What was copied, in blocks; `first` and `later` swap-outs of a request apart."""

    out: int = 0
    into: int = 0
    first_out: int = 0
    first_out_copied: int = 0
    later_out: int = 0
    later_out_copied: int = 0


@dataclass
class KvCache:
    """A `Demand` and a `SwapDemand`: answers the planner as the live engine does.

    Prompts share no prefix, one KV cache group, no adapters, no drafts.

    Attributes:
        device: the free device blocks.
        block_tokens: tokens that a block holds.
        host_blocks: blocks of the host pool.
        channels: the copies in flight, and what they take.
        step_time: what computing tokens costs, as far as the scheduler knows.
    """

    device: FreeBlocks
    block_tokens: int
    host_blocks: int
    channels: CopyChannels
    step_time: StepTimeModel
    counters: CopyCounters = field(default_factory=CopyCounters)
    free_host_blocks: int = field(init=False)
    # Copies that could be dropped for their room, least recently used first.
    _retained: OrderedDict[LiveRequest, None] = field(default_factory=OrderedDict)
    _reclaimable: int = 0
    # Who computed a prefix last: its blocks are in use, or free and perhaps reused.
    _prefixes: dict[str, LiveRequest] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.free_host_blocks = self.host_blocks

    # ---- Demand -------------------------------------------------------------------------------

    def unready(self, jobs: Sequence[Job]) -> list[Job]:
        """Nobody: steps do not overlap."""
        return []

    def new_blocks(self, job: Job) -> int:
        """Device blocks for all of its tokens, beyond those it holds."""
        return self.blocks_of(job.handle.num_tokens) - int(job.handle.blocks)

    def freed_blocks(self, job: Job) -> int | None:
        """Its blocks, unless it enters in this step or a copy reads them."""
        sequence: LiveRequest = job.handle
        if job.state is not JobState.PAUSED and not sequence.entered:
            return None
        return None if sequence.host is HostState.SAVING else sequence.blocks

    def adapter(self, job: Job) -> int:
        """None are in use."""
        return 0

    def holds_kv(self, job: Job) -> bool:
        """Whether it has device blocks."""
        return bool(job.handle.blocks)

    # ---- SwapDemand ---------------------------------------------------------------------------

    def out_s(self, job: Job) -> float:
        """Seconds of copying to the host what it lacks."""
        return self._missing_blocks(job.handle) * self.channels.block_s

    def in_s(self, job: Job) -> float:
        """Seconds of copying all back."""
        tokens = job.handle.computed or job.handle.host_tokens
        return self.blocks_of(tokens) * self.channels.block_s

    def unsaved_blocks(self, job: Job) -> int:
        """Full blocks that the host lacks; 0 while a copy is in flight."""
        sequence: LiveRequest = job.handle
        if not sequence.entered or sequence.host not in (HostState.NONE, HostState.RETAINED):
            return 0
        return (sequence.computed - sequence.host_tokens) // self.block_tokens

    def recompute_s(self, job: Job) -> float:
        """Seconds that computing its tokens again adds to steps that run anyway."""
        return float(job.handle.computed * self.step_time.prefill_token_s)

    def has_host_room(self, job: Job) -> bool:
        """Whether the host could take all of it, dropping the retained copies of others."""
        sequence: LiveRequest = job.handle
        if not sequence.computed or sequence.host not in (HostState.NONE, HostState.RETAINED):
            return False
        room = self.free_host_blocks + self._reclaimable
        return self.blocks_of(sequence.computed) <= room

    # ---- device -------------------------------------------------------------------------------

    def blocks_of(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def grow(self, sequence: LiveRequest, tokens: int) -> None:
        """Allocate the blocks of the sequence's first `tokens` tokens.

        Raises:
            RuntimeError: the device has none left, so the plan was wrong.
        """
        wanted = self.blocks_of(tokens) - sequence.blocks
        if wanted > 0:
            self.device.take(wanted)
            sequence.blocks += wanted

    def find(self, sequence: LiveRequest) -> bool:
        """Give the sequence what the device still has of it; returns whether it was looked for."""
        if sequence.freed is not None:
            self.adopt(sequence)
            return True
        tokens = self.cached_tokens(sequence.request)
        if not tokens:
            return False
        holder = self._prefixes[sequence.request.prefix]
        blocks = tokens // self.block_tokens
        if holder.computed:
            # In use, so vLLM would share these blocks: here each has its own.
            self.grow(sequence, tokens)
        elif holder.freed is not None:
            blocks = self.device.adopt(holder.freed, blocks)
            sequence.blocks += blocks
        sequence.computed = blocks * self.block_tokens
        return True

    def cached_tokens(self, request: Request) -> int:
        """Tokens of the request's prefix that the device has, in full blocks.

        The last token of a prompt is computed in any case.
        """
        holder = self._prefixes.get(request.prefix) if request.prefix else None
        if holder is None:
            return 0
        there = holder.computed
        if not there and holder.freed is not None:
            there = holder.freed.blocks * self.block_tokens
        tokens = min(there, request.prefix_tokens, request.prompt_tokens - 1)
        return tokens // self.block_tokens * self.block_tokens

    def remember(self, sequence: LiveRequest) -> None:
        """The sequence's prefix is computed: others find it there."""
        if sequence.request.prefix:
            self._prefixes[sequence.request.prefix] = sequence

    def adopt(self, sequence: LiveRequest) -> int:
        """Take back those of its freed blocks that were not reused; returns how many.

        The last token is computed in any case: somebody has to sample the next one.
        """
        freed, sequence.freed = sequence.freed, None
        if freed is None:
            return 0
        most = (sequence.num_tokens - 1) // self.block_tokens
        blocks = self.device.adopt(freed, most)
        sequence.blocks += blocks
        sequence.computed = blocks * self.block_tokens
        return blocks

    def release(self, sequence: LiveRequest) -> None:
        """Free the device blocks, the last one first; the full ones may be adopted again."""
        full = sequence.computed // self.block_tokens
        self.device.drop(sequence.blocks - full)
        sequence.freed = self.device.put(full)
        sequence.blocks = sequence.computed = 0
        sequence.entered = False

    def forget(self, sequence: LiveRequest) -> None:
        """The request has finished: nothing of it is kept, but for a prefix that others share."""
        prefix = sequence.request.prefix
        if prefix and self._prefixes.get(prefix) is sequence:
            self.release(sequence)
        else:
            self.device.drop(sequence.blocks)
            sequence.blocks = 0
        self._drop_copy(sequence)

    # ---- host ---------------------------------------------------------------------------------

    def leave(self, sequence: LiveRequest) -> int | None:
        """Make the host's copy cover what is computed; blocks to copy, None without room."""
        missing = self._missing_blocks(sequence)
        if not self._cover(sequence, sequence.computed):
            return None
        sequence.host = HostState.MOVING
        blocks = sequence.host_blocks
        if sequence.left_before:
            self.counters.later_out += blocks
            self.counters.later_out_copied += missing
        else:
            self.counters.first_out += blocks
            self.counters.first_out_copied += missing
        sequence.left_before = True
        self.counters.out += missing
        return missing

    def save(self, job: Job, now_s: float) -> None:
        """Begin to copy its full blocks in advance, if there is room."""
        sequence: LiveRequest = job.handle
        blocks = self.unsaved_blocks(job)
        tokens = sequence.computed // self.block_tokens * self.block_tokens
        if blocks and self._cover(sequence, tokens):
            sequence.host = HostState.SAVING
            self.counters.out += blocks
            self.channels.begin(Copy(job, blocks), "out", now_s)

    def come_back(self, sequence: LiveRequest) -> int:
        """Allocate device blocks for what the host holds; returns how many have to be copied."""
        adopted = self.adopt(sequence)
        tokens = max(min(sequence.host_tokens, sequence.num_tokens - 1), sequence.computed)
        self.grow(sequence, tokens)
        sequence.computed = tokens
        sequence.host = HostState.MOVING
        blocks = self.blocks_of(tokens) - adopted
        self.counters.into += blocks
        return blocks

    def retain(self, sequence: LiveRequest) -> None:
        """The copy is not needed now: it may be dropped for its room."""
        if sequence.host is not HostState.RETAINED:
            sequence.host = HostState.RETAINED
            self._reclaimable += sequence.host_blocks
        self._retained[sequence] = None
        self._retained.move_to_end(sequence)

    def check_integrity(self, sequences: list[LiveRequest], device_blocks: int) -> None:
        """Law I4: device and host blocks are conserved.

        Raises:
            AssertionError: naming the law.
        """
        held = sum(s.blocks for s in sequences)
        assert self.device.count + held == device_blocks, "I4: device blocks"
        assert self.device.count >= 0, "I4: device blocks"
        host = sum(s.host_blocks for s in sequences)
        assert self.free_host_blocks + host == self.host_blocks, "I4: host blocks"
        assert self.free_host_blocks >= 0, "I4: host blocks"
        assert self._reclaimable == sum(s.host_blocks for s in self._retained), "I4: retained"

    def _missing_blocks(self, sequence: LiveRequest) -> int:
        if sequence.host_tokens >= sequence.computed:
            return 0
        saved = sequence.host_tokens // self.block_tokens
        return self.blocks_of(sequence.computed) - saved

    def _cover(self, sequence: LiveRequest, tokens: int) -> bool:
        """Give the sequence's copy room for so many tokens, dropping others' retained copies."""
        self._unretain(sequence)
        wanted = self.blocks_of(tokens) - sequence.host_blocks
        if wanted > self.free_host_blocks + self._reclaimable:
            if sequence.host_blocks:
                self.retain(sequence)
            return False
        while wanted > self.free_host_blocks:
            self._drop_copy(next(iter(self._retained)))
        self.free_host_blocks -= wanted
        sequence.host_blocks += wanted
        sequence.host_tokens = tokens
        return True

    def _unretain(self, sequence: LiveRequest) -> None:
        if sequence.host is HostState.RETAINED:
            del self._retained[sequence]
            self._reclaimable -= sequence.host_blocks
            sequence.host = HostState.NONE

    def _drop_copy(self, sequence: LiveRequest) -> None:
        self._unretain(sequence)
        self.free_host_blocks += sequence.host_blocks
        sequence.host_blocks = sequence.host_tokens = 0
        sequence.host = HostState.NONE
