"""A fake host that moves KV cache, whose copies take steps and may fail."""

from collections.abc import Collection
from dataclasses import dataclass, field

from fake_host import BLOCK_TOKENS, FakeHost, Stage, blocks_for

from fastserve_vllm.policy.base import Fcfs, Policy
from fastserve_vllm.policy.budget import StepLimits
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.step_plan import StepPlan

MOVING = (JobState.SWAPPING_OUT, JobState.SWAPPING_IN)
MODES = ("recompute", "reactive", "proactive")


def make_planner(policy: Policy, host: "SwapHost", mode: str) -> StepPlanner:
    """A planner whose KV cache moves as the mode says."""
    swap = None if mode == "recompute" else host
    return StepPlanner(policy, host, swap, host.num_blocks if mode == "proactive" else None)


@dataclass(eq=False)
class Copy:
    """A copy in flight; a job that is saved goes on.

    `device_blocks` are those of a job that did not wait for it.
    """

    job: Job | None
    state: JobState | None
    steps_left: int
    host_blocks: int = 0
    device_blocks: int = 0
    fails: bool = False


@dataclass
class SwapHost(FakeHost):
    """A `SwapDemand` too.

    Attributes:
        host_blocks: blocks of the host.
        copy_steps: steps that a copy takes which no step waits for; 0: none.
        block_copy_s, token_s: seconds of copying a block, of computing a token.
        kept: host blocks by job, for KV cache that is on the host, or on its way.
        saved: blocks by job that the host has too. They count as room: it may drop them.
        broken: jobs that are not copied again, for a copy of theirs failed.
        returned: jobs that came back and have not run since: served after those that stayed, as
            if they were queued.
        refused: those of them that the last step had no room for; they keep their KV cache.
    """

    host_blocks: int = 0
    copy_steps: int = 0
    block_copy_s: float = 0.0
    token_s: float = 1.0
    kept: dict[Job, int] = field(default_factory=dict)
    broken: set[Job] = field(default_factory=set)
    saved: dict[Job, int] = field(default_factory=dict)
    returned: set[Job] = field(default_factory=set)
    copies: list[Copy] = field(default_factory=list)
    refused: list[Job] = field(default_factory=list)
    refusals: int = 0

    # ---- SwapDemand -----------------------------------------------------------------------

    def out_s(self, job: Job) -> float:
        self.calls += 1
        return self.block_copy_s * self._unsaved(job)

    def in_s(self, job: Job) -> float:
        self.calls += 1
        return self.block_copy_s * blocks_for(job.handle.computed or job.swapped_tokens)

    def unsaved_blocks(self, job: Job) -> int:
        self.calls += 1
        busy = any(copy.job is job for copy in self.copies)
        return 0 if busy else job.handle.computed // BLOCK_TOKENS - self.saved.get(job, 0)

    def recompute_s(self, job: Job) -> float:
        self.calls += 1
        return self.token_s * job.handle.computed

    def has_host_room(self, job: Job) -> bool:
        self.calls += 1
        computed = job.handle.computed
        return 0 < blocks_for(computed) <= self.free_host_blocks and job not in self.broken

    @property
    def free_host_blocks(self) -> int:
        leftovers = sum(copy.host_blocks for copy in self.copies if copy.job is None)
        return self.host_blocks - sum(self.kept.values()) - leftovers

    def freed_blocks(self, job: Job) -> int | None:
        # The engine has not let in yet whoever starts in this very step.
        enters = job in self.returned or not job.handle.computed
        return None if job.state is JobState.RUNNING and enters else super().freed_blocks(job)

    # ---- the engine -----------------------------------------------------------------------

    def free_blocks(self, planner: StepPlanner) -> int:
        return super().free_blocks(planner) - sum(copy.device_blocks for copy in self.copies)

    def move(self, plan: StepPlan, planner: StepPlanner, now_s: float) -> None:
        """Apply what the plan says of KV cache, before the step computes."""
        for job in plan.spilled:
            if self.has_host_room(job):
                self.leave(job)
            else:
                self.drop(job)
                planner.evict(job, now_s)
        for job in plan.recomputed:
            self.drop(job)
        for job in plan.saved:
            self._begin(Copy(job, None, self.copy_steps), planner, now_s)
        for job in plan.swapped_out:
            if self.has_host_room(job):
                self.kept[job] = blocks_for(job.handle.computed)
                self._begin_moving(job, planner, now_s)
            else:
                planner.stayed(job)
        for job in plan.swapped_in:
            room = self.free_blocks(planner)
            job.handle.blocks = self.kept[job]
            assert job.handle.blocks <= room, f"no block is left to bring back {job}"
            self._begin_moving(job, planner, now_s)

    def run(
        self,
        plan: StepPlan,
        planner: StepPlanner,
        limits: StepLimits,
        resident: Collection[Job],
        missed: Collection[Job] = (),
    ) -> list[Job]:
        finished = super().run(plan, planner, limits, resident, missed)
        for job in plan.batch:
            if job not in self.refused:
                self.returned.discard(job)
                job.swapped_tokens = 0
            if self.kept.pop(job, None):
                self.saved[job] = job.handle.computed // BLOCK_TOKENS
        return finished

    def step_copies(self, planner: StepPlanner, now_s: float) -> None:
        """A step ended: copies that have taken their time are over."""
        for job in self.refused:
            planner.evict(job, now_s)
        self.refusals += len(self.refused)
        self.refused.clear()
        for copy in self.copies.copy():
            copy.steps_left -= 1
            if copy.steps_left <= 0:
                self._land(copy, planner, now_s)

    def drop(self, job: Job) -> None:
        """The job's KV cache is gone, from the host too; a copy in flight holds its blocks on."""
        for copy in self.copies:
            if copy.job is job:
                copy.device_blocks = job.handle.blocks if copy.state is not None else 0
                copy.job = None
        self.kept.pop(job, None)
        self.saved.pop(job, None)
        self.returned.discard(job)
        job.swapped_tokens = 0
        super().drop(job)

    def check_integrity(self, planner: StepPlanner) -> None:
        """Law I4: blocks are conserved, and every job's KV cache is where its state says."""
        assert self.free_blocks(planner) >= 0
        assert self.free_host_blocks >= 0
        moving = {copy.job: copy.state for copy in self.copies if copy.job and copy.state}
        assert self.kept.keys() <= set(planner.jobs)
        for job in planner.jobs:
            spilled = job.state is JobState.SWAPPED or bool(job.swapped_tokens)
            assert (job in self.kept) == (spilled or job in moving), job
            assert moving.get(job, job.state) is job.state, job
            assert job in moving or job.state not in MOVING, job
            assert job.handle.blocks == 0 or not spilled or job in moving, job

    def _begin_moving(self, job: Job, planner: StepPlanner, now_s: float) -> None:
        self._begin(Copy(job, job.state, self.copy_steps, self.kept[job]), planner, now_s)

    def _begin(self, copy: Copy, planner: StepPlanner, now_s: float) -> None:
        self.copies.append(copy)
        if self.copy_steps == 0:
            self._land(copy, planner, now_s)

    def _land(self, copy: Copy, planner: StepPlanner, now_s: float) -> None:
        """What becomes of the job once its copy is over, well or not."""
        job = copy.job
        self.copies.remove(copy)
        if job is None:
            return
        if copy.fails:
            self.broken.add(job)
            self.saved.pop(job, None)
        if copy.state is None:
            if not copy.fails:
                self.saved[job] = job.handle.computed // BLOCK_TOKENS
        elif copy.state is JobState.SWAPPING_OUT:
            self._land_out(job, planner, fails=copy.fails)
        elif copy.fails:
            self.drop(job)
            planner.evict(job, now_s)
        else:
            self._come_back(job)
            planner.swapped_in(job)

    def _land_out(self, job: Job, planner: StepPlanner, *, fails: bool) -> None:
        if fails:
            del self.kept[job]
            planner.stayed(job)
        else:
            self.leave(job)
            planner.swapped_out(job)

    def _refuses(self, job: Job, tokens: int, planner: StepPlanner) -> bool:
        if job not in self.returned:
            return False
        blocks = self.new_blocks(job)
        scarce = blocks > 0 and blocks + self.headroom_blocks > self.free_blocks(planner)
        if scarce or tokens == 0:
            self.refused.append(job)
        return scarce or tokens == 0

    def _unsaved(self, job: Job) -> int:
        return blocks_for(job.handle.computed) - self.saved.get(job, 0)

    def leave(self, job: Job) -> None:
        """The job's KV cache is on the host, and its device blocks are free."""
        request = job.handle
        self.kept[job] = blocks_for(request.computed)
        for copy in self.copies:
            # What was being saved is on the host with the rest.
            if copy.job is job and copy.state is None:
                copy.job = None
        # Of the last token there is no KV cache to speak of: it is computed again.
        job.swapped_tokens = min(request.computed, request.num_tokens - 1)
        request.blocks = request.computed = 0
        self.returned.discard(job)
        job.next_tokens = request.num_tokens - job.swapped_tokens

    def _come_back(self, job: Job) -> None:
        del self.kept[job]
        self.returned.add(job)
        job.handle.computed, job.swapped_tokens = job.swapped_tokens, 0
        self.saved[job] = job.handle.computed // BLOCK_TOKENS


class SwapStage(Stage):
    """A stage whose planner moves KV cache."""

    def __init__(self, policy: Policy | None = None, mode: str = "proactive", **host: object):
        super().__init__(policy)
        self.host = SwapHost(**host)
        self.planner = make_planner(policy or Fcfs(), self.host, mode)
        self.mode = mode

    def step(self, batch_limit: int = 8, token_budget: int = 512, **options: object) -> str:
        batch = super().step(batch_limit, token_budget, **options)
        self.host.step_copies(self.planner, self.now_s)
        self.planner.check_integrity()
        self.host.check_integrity(self.planner)
        return batch
