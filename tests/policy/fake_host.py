"""A host that holds requests, device blocks and slots, and runs the plans that it is given."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fastserve_vllm.policy.base import Fcfs, Policy
from fastserve_vllm.policy.budget import StepLimits
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.step_plan import StepPlan

TICK_S = 2.0**-10
"""Times are multiples of this, so that sums of them are exact."""
BLOCK_TOKENS = 4


@dataclass(eq=False)
class FakeRequest:
    """The truth about a request, which the policy never sees."""

    prompt: int
    output: int
    adapter: int = 0
    cached: int = 0
    generated: int = 0
    computed: int = 0
    blocks: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prompt + self.generated

    @property
    def most_blocks(self) -> int:
        """Blocks that it holds at its end."""
        return blocks_for(self.prompt + self.output)


def blocks_for(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def make_job(
    name: str,
    prompt: int = 1,
    output: int = 1,
    priority: int = 0,
    first_step_s: float | None = None,
    **options: int,
) -> Job:
    """A job of a request, a tick of first step for each token of its prompt unless told.

    The options go to the request.
    """
    request = FakeRequest(prompt, output, **options)
    if first_step_s is None:
        first_step_s = prompt * TICK_S
    job = Job(name, prompt, priority, first_step_s, handle=request)
    job.next_tokens = prompt - request.cached
    return job


@dataclass
class FakeHost:
    """A `Demand`, and an engine that follows a plan or fails an assertion.

    Attributes:
        num_blocks: device blocks; slots: model-runner slots, None where pausing keeps none.
        stalled: jobs whose next token is in flight. calls: answers given to the planner.
    """

    num_blocks: int = 1 << 20
    slots: int | None = None
    headroom_blocks: int = 0
    stalled: set[Job] = field(default_factory=set)
    calls: int = 0

    # ---- Demand ---------------------------------------------------------------------------

    def unready(self, jobs: Sequence[Job]) -> list[Job]:
        self.calls += len(jobs)
        return [job for job in jobs if job in self.stalled]

    def new_blocks(self, job: Job) -> int:
        self.calls += 1
        return max(blocks_for(job.handle.num_tokens) - job.handle.blocks, 0)

    def freed_blocks(self, job: Job) -> int | None:
        self.calls += 1
        return None if job in self.stalled else job.handle.blocks

    def adapter(self, job: Job) -> int:
        self.calls += 1
        return job.handle.adapter

    def holds_kv(self, job: Job) -> bool:
        self.calls += 1
        return job.handle.blocks > 0

    # ---- the engine -----------------------------------------------------------------------

    def limits(self, planner: StepPlanner, **options: object) -> StepLimits:
        """The room of the next step; `options` are the limits that are not the device's."""
        roster = planner.roster
        free_slots = None if self.slots is None else self.slots - roster.num_residents
        return StepLimits(
            free_blocks=self.free_blocks(planner),
            block_tokens=BLOCK_TOKENS,
            headroom_blocks=self.headroom_blocks,
            occupied=roster.occupied,
            free_slots=free_slots,
            **options,
        )

    def free_blocks(self, planner: StepPlanner) -> int:
        return self.num_blocks - sum(job.handle.blocks for job in planner.jobs)

    def move(self, plan: StepPlan, planner: StepPlanner, now_s: float) -> None:
        """Give up the KV cache of those that the plan recomputes."""
        for job in plan.recomputed:
            self.drop(job)

    def drop(self, job: Job) -> None:
        """The job's KV cache is gone."""
        request = job.handle
        request.blocks = request.computed = 0
        job.next_tokens = request.num_tokens

    def run(
        self,
        plan: StepPlan,
        planner: StepPlanner,
        limits: StepLimits,
        resident: Collection[Job],
        missed: Collection[Job] = (),
    ) -> list[Job]:
        """Serve the batch as vLLM does, jobs that were resident first; return who finished.

        Raises:
            AssertionError: the step has no room for a job of the batch.
        """
        tokens = limits.token_budget
        finished = []
        for job in sorted(plan.batch, key=lambda job: job not in resident):
            if self._refuses(job, tokens, planner):
                continue
            computed = self._serve(job, tokens, limits, planner, queued=job not in resident)
            tokens -= computed
            if job not in missed and self._advance(job, computed):
                finished.append(job)
            if job in missed and job not in resident:
                self.drop(job)
        return finished

    def _refuses(self, job: Job, tokens: int, planner: StepPlanner) -> bool:
        """Whether the job is left out though the plan has it in the batch."""
        return False

    def _serve(
        self, job: Job, tokens: int, limits: StepLimits, planner: StepPlanner, *, queued: bool
    ) -> int:
        """Allocate the job's blocks; return the tokens that it computes."""
        wanted = min(job.next_tokens, limits.prefill_chunk)
        computed = min(wanted, tokens)
        assert computed > 0, f"no token is left for {job}"
        assert computed == wanted or limits.chunked_prefill, f"{job} would be split"
        assert computed == wanted or job.next_tokens > limits.decode_tokens, f"half a decode: {job}"
        blocks = blocks_for(job.handle.num_tokens) - job.handle.blocks
        beside = queued and any(j.handle.blocks for j in planner.jobs if j is not job)
        room = self.free_blocks(planner) - (self.headroom_blocks if beside else 0)
        assert blocks == 0 or blocks <= room, f"no block is left for {job}"
        job.handle.blocks += blocks
        return computed

    def _advance(self, job: Job, computed: int) -> bool:
        """Compute the tokens; whether that was the job's last step."""
        request = job.handle
        request.computed = request.num_tokens - job.next_tokens + computed
        if request.computed == request.num_tokens:
            request.generated += 1
        job.next_tokens = request.num_tokens - request.computed
        return request.generated == request.output


def queued_jobs(planner: StepPlanner) -> list[Job]:
    """The jobs that are queued."""
    return [job for job in planner.jobs if job.state is JobState.QUEUED]


class Stage:
    """A planner, a host and jobs known by name, for tests that are tables of steps."""

    def __init__(self, policy: Policy | None = None, **host: object) -> None:
        self.host = FakeHost(**host)
        self.planner = StepPlanner(policy or Fcfs(), self.host)
        self.jobs: dict[str, Job] = {}
        self.plan = StepPlan(())
        self.now_s = 0.0
        self.finished_at_s: dict[str, float] = {}
        self._unobserved_s = 0.0

    def add(self, name: str, prompt: int = 1, output: int = 1 << 20, **options: float) -> Job:
        """A job arrives."""
        job = self.jobs[name] = make_job(name, prompt, output, **options)
        self.planner.add(job, self.now_s)
        return job

    def step(self, batch_limit: int = 8, token_budget: int = 512, **options: object) -> str:
        """Observe, plan, run; return the names of the batch. Steps cost no time."""
        self.planner.observe(self._unobserved_s, self.now_s)
        self._unobserved_s = 0.0
        limits = self.host.limits(
            self.planner, batch_limit=batch_limit, token_budget=token_budget, **options
        )
        resident = [job for job in self.planner.jobs if job.state not in _NOT_RESIDENT]
        self.plan = self.planner.plan(limits, self.now_s)
        self.host.move(self.plan, self.planner, self.now_s)
        for job in self.host.run(self.plan, self.planner, limits, resident):
            self.planner.remove(job)
            self.finished_at_s[job.job_id] = self.now_s
        self.planner.check_integrity()
        return names(self.plan.batch)

    def spend(self, seconds: float) -> None:
        """The last step took so long."""
        self.now_s += seconds
        self._unobserved_s += seconds


def names(jobs: Sequence[Job]) -> str:
    """The jobs' names, in order."""
    return " ".join(job.job_id for job in jobs)


_NOT_RESIDENT = (JobState.QUEUED, JobState.BLOCKED)
