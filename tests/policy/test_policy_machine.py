"""Invariants I1, I2, I3 and I9 of the planner and the policy, whatever happens to them."""

from fake_host import TICK_S, FakeHost, blocks_for, make_job, queued_jobs
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import CheckedMlfq, ReferencePlan, by_key, reference_plan

from fastserve_vllm.policy.budget import StepLimits, Verdict
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.plan import StepPlan, StepPlanner
from fastserve_vllm.policy.quantum import QuantumLadder

RESIDENT = (JobState.RUNNING, JobState.PAUSED)
ticks = st.integers(1, 64)
picks = st.randoms(use_true_random=False)


@st.composite
def step_options(draw) -> dict[str, object]:
    """Limits of a step that do not come from the device."""
    return {
        "batch_limit": draw(st.integers(0, 6)),
        "token_budget": draw(st.sampled_from([1, 3, 8, 24, 512])),
        "prefill_chunk": draw(st.sampled_from([1 << 62, 5])),
        "chunked_prefill": draw(st.booleans()),
        "max_adapters": draw(st.sampled_from([None, None, 1, 2])),
        "overlapping": draw(st.booleans()),
        "admit_queued": draw(st.integers(0, 5)) > 0,
    }


class PolicyMachine(RuleBasedStateMachine):
    """Everything that can happen to a job, in any order, on a device of any size."""

    @initialize(
        base=st.integers(1, 8),
        levels=st.integers(1, 5),
        steady=st.integers(1, 5),
        pressure=st.integers(0, 4),
        limit=st.sampled_from([None, 16, 64, 256]),
        promotions=st.sampled_from([None, 1, 2]),
        skip_join=st.booleans(),
        blocks=st.integers(18, 80),
        slots=st.sampled_from([None, 1, 3, 8]),
        headroom=st.integers(0, 2),
    )
    def build(
        self, base, levels, steady, pressure, limit, promotions, skip_join, blocks, slots, headroom
    ):
        self.policy = CheckedMlfq(
            QuantumLadder(base * TICK_S, 2.0, levels),
            skip_join=skip_join,
            starvation_limit_s=None if limit is None else limit * TICK_S,
            steady_levels=steady,
            pressure_jobs=pressure,
            max_promotions=promotions,
        )
        self.host = FakeHost(blocks, slots, headroom)
        self.planner = StepPlanner(self.policy, self.host)
        self.now_s = self.unobserved_s = 0.0
        self.arrived = self.left = 0

    # ---- what can happen ------------------------------------------------------------------

    @rule(
        prompt=st.integers(1, 40),
        output=st.integers(1, 12),
        priority=st.integers(-1, 1),
        adapter=st.integers(0, 3),
        cached=st.integers(0, 39),
        blocked=st.booleans(),
    )
    def arrive(self, prompt, output, priority, adapter, cached, blocked):
        cached = min(cached, prompt - 1) if cached % 2 else 0
        job = make_job(
            f"job-{self.arrived}",
            prompt,
            output,
            priority=priority,
            adapter=adapter,
            cached=cached,
        )
        self.arrived += 1
        if blocked:
            self.planner.add_blocked(job)
        else:
            self.planner.add(job, self.now_s)

    @rule(options=step_options(), length=ticks, misses=st.booleans(), pick=picks)
    def step(self, options, length, misses, pick):
        """A step; now and then the host does not run a job of the batch."""
        chance = 0.3 if misses else 0.0
        self.run_step(options, length, lambda job: pick.random() < chance)

    def run_step(self, options, length, misses=lambda job: False):
        """The whole life of a step: observe, plan, apply, run."""
        self.observe()
        plan, limits, states = self.plan(options)
        resident = [job for job in plan.batch if states[job] in RESIDENT]
        missed = [job for job in plan.batch if misses(job)]
        self.host.apply(plan)
        for job in self.host.run(plan, self.planner, limits, resident, missed):
            self.remove(job)
        for number, job in enumerate(missed):
            self.miss(job, resident=job in resident, blocked=number % 4 == 3)
        self.now_s += length * TICK_S
        self.unobserved_s += length * TICK_S

    def miss(self, job, *, resident, blocked):
        """Tell the planner of a job that the host did not run."""
        if resident:
            self.planner.missed(job, self.now_s)
        elif blocked:
            self.planner.block(job)
        else:
            self.planner.evict(job, self.now_s)

    @rule(pick=picks)
    def abort(self, pick):
        self.remove_some(pick, *JobState)

    @rule(pick=picks)
    def host_preempts(self, pick):
        """The host gives up a resident's KV cache by itself."""
        if job := self.some(pick, *RESIDENT):
            self.host.drop(job)
            self.planner.evict(job, self.now_s)

    @rule(pick=picks)
    def block(self, pick):
        if job := self.some(pick, *JobState):
            self.planner.block(job)
            self.host.drop(job)

    @rule(pick=picks, loaded=st.booleans())
    def unblock(self, pick, loaded):
        """A blocked job can run; its KV cache may have come from elsewhere in the meantime."""
        if job := self.some(pick, JobState.BLOCKED):
            if loaded and self.room_to_load(job):
                job.handle.blocks, job.next_tokens = blocks_for(job.handle.num_tokens), 1
            self.planner.unblock(job, self.now_s)

    @rule(pick=picks)
    def stall(self, pick):
        if job := self.some(pick, *JobState):
            self.host.stalled.add(job)

    @precondition(lambda self: self.host.stalled)
    @rule()
    def output_arrives(self):
        self.host.stalled.clear()

    @rule(length=ticks)
    def wait(self, length):
        self.now_s += length * TICK_S

    @rule(base=st.integers(1, 8))
    def rebase(self, base):
        ladder = QuantumLadder(base * TICK_S / 2, 2.0, self.policy.num_levels)
        self.policy.set_ladder(ladder, self.planner.running)

    @rule()
    def observe(self):
        self.planner.observe(self.unobserved_s, self.now_s)
        self.unobserved_s = 0.0

    # ---- what must hold -------------------------------------------------------------------

    @invariant()
    def integrity(self):
        self.planner.check_integrity()
        self.policy.compare()
        assert sum(self.planner.state_counts().values()) == len(self.planner)
        assert len(self.planner) == self.arrived - self.left
        assert self.host.free_blocks(self.planner) >= 0

    def plan(self, options) -> tuple[StepPlan, StepLimits, dict[Job, JobState]]:
        """Plan a step, and check the plan; returns also the states before it."""
        limits = self.host.limits(self.planner, **options)
        states = {job: job.state for job in self.planner.jobs}
        declined = sum(self.planner.counters.declined.values())
        expected = reference_plan(self.planner.jobs, limits, self.host)
        plan = self.planner.plan(limits, self.now_s)
        declined -= sum(self.planner.counters.declined.values())
        assert list(plan.batch) == expected.batch
        assert list(plan.recomputed) == expected.recomputed
        self.check_states(plan, states)
        self.check_victims(plan, states)
        self.check_limits(plan, limits, states)
        self.check_order(plan, limits, expected)
        if not declined:
            self.check_work_conserving(plan, limits, states)
        return plan, limits, states

    def check_states(self, plan, states):
        """The plan's lists agree with the state changes, and with nothing else."""
        after = {job: job.state for job in self.planner.jobs}
        batch, started, paused = set(plan.batch), set(plan.started), set(plan.paused)
        recomputed = set(plan.recomputed)
        assert len(batch) == len(plan.batch)
        assert len(started) == len(plan.started)
        assert len(paused) == len(plan.paused)
        assert batch == {job for job in after if after[job] is JobState.RUNNING}
        assert started == {job for job in batch if states[job] is not JobState.RUNNING}
        ran = {job for job in after if states[job] is JobState.RUNNING}
        assert paused == ran - batch - recomputed
        assert all(after[job] is JobState.PAUSED for job in paused)
        assert all(after[job] is JobState.QUEUED for job in recomputed)
        for job in after.keys() - batch - paused - recomputed:
            assert after[job] is states[job]

    def check_victims(self, plan, states):
        """A victim had KV cache and comes after a job of the batch that needed its room."""
        if not plan.recomputed:
            return
        assert all(states[job] in RESIDENT for job in plan.recomputed)
        assert not set(plan.batch) & set(plan.recomputed)
        needy = [
            job
            for job in plan.batch
            if states[job] is JobState.QUEUED or self.host.new_blocks(job) > 0
        ]
        first = min(needy, key=by_key)
        assert all(first.key < victim.key for victim in plan.recomputed)

    def check_limits(self, plan, limits, states):
        """No limit is exceeded; blocks and tokens are checked again by the host, job by job."""
        assert len(plan.batch) <= limits.batch_limit
        if limits.max_adapters is not None:
            adapters = {job.handle.adapter for job in plan.batch} - {0}
            assert len(adapters) <= limits.max_adapters
        if self.host.slots is not None:
            assert self.planner.num_residents <= self.host.slots
        if limits.overlapping:
            assert not set(plan.batch) & self.host.stalled
        if not limits.admit_queued:
            assert all(self.host.holds_kv(job) for job in plan.batch)

    def check_order(self, plan, limits, expected: ReferencePlan):
        """I9: who stands before a job of the batch and is not in it was told why."""
        if not plan.batch:
            return
        last, batch = max(job.key for job in plan.batch), set(plan.batch)
        queued, turned_away = set(queued_jobs(self.planner)), False
        for job in sorted(expected.verdicts, key=by_key):
            turned_away |= job is expected.partial
            if job in batch or job.key > last:
                continue
            if expected.verdicts[job] is Verdict.DECLINED:
                turned_away |= job in queued
                continue
            assert expected.verdicts[job] is Verdict.SKIPPED
            in_flight = limits.overlapping and job in self.host.stalled
            assert in_flight or job in plan.recomputed or (turned_away and job in queued)

    def check_work_conserving(self, plan, limits, states):
        """I9: where nobody was declined, the batch is the first of the jobs that are ready."""
        ready = [
            job
            for job, state in states.items()
            if state is not JobState.BLOCKED
            and not (limits.overlapping and job in self.host.stalled)
            and (limits.admit_queued or state in RESIDENT or self.host.holds_kv(job))
            and job not in plan.recomputed
        ]
        first = sorted(ready, key=by_key)[: limits.batch_limit]
        wanted = sum(min(job.next_tokens, limits.prefill_chunk) for job in first)
        if wanted <= limits.token_budget:
            assert sorted(plan.batch, key=by_key) == first

    # ---- helpers --------------------------------------------------------------------------

    def some(self, pick, *states) -> Job | None:
        jobs = [job for job in self.planner.jobs if job.state in states]
        return pick.choice(jobs) if jobs else None

    def room_to_load(self, job) -> bool:
        """Loads leave room for any one job to run: nobody can take back what they hold."""
        loaded = sum(job.handle.blocks for job in queued_jobs(self.planner))
        blocks = blocks_for(job.handle.num_tokens)
        spare = min(self.host.num_blocks - 18 - loaded, self.host.free_blocks(self.planner))
        return blocks <= spare

    def remove_some(self, pick, *states):
        if job := self.some(pick, *states):
            self.remove(job)

    def remove(self, job):
        self.planner.remove(job)
        self.host.stalled.discard(job)
        self.left += 1

    def teardown(self):
        """Left alone and not promoted, every job finishes, and nothing is left behind."""
        if not hasattr(self, "planner"):
            return
        self.host.stalled.clear()
        self.policy.starvation_limit_s = None
        for job in [job for job in self.planner.jobs if job.state is JobState.BLOCKED]:
            self.planner.unblock(job, self.now_s)
        steps = 10 * sum(job.handle.prompt + job.handle.output for job in self.planner.jobs)
        while len(self.planner) and steps:
            self.run_step({"batch_limit": 3, "token_budget": 16}, length=4)
            self.integrity()
            steps -= 1
        assert len(self.planner) == 0, "a job never finishes"
        assert self.policy.level_sizes == [0] * self.policy.num_levels
        assert not self.policy._waiting
        assert self.policy._num_jobs == self.policy._num_running == 0


PolicyMachine.TestCase.settings = settings(
    max_examples=300, stateful_step_count=40, report_multiple_bugs=False
)
TestPolicyMachine = PolicyMachine.TestCase
