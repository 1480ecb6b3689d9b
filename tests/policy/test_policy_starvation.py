"""Invariant I6: how long a job can wait for its next turn; and that turns lead somewhere."""

from fake_host import TICK_S, FakeHost, Stage, make_job, names
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.quantum import QuantumLadder

WAITING = (JobState.QUEUED, JobState.PAUSED)


class BoundedLoad(RuleBasedStateMachine):
    """One priority class, at most a batch of waiting jobs, steps of at least the base quantum.

    Nothing else binds. Then whoever waits fits into the batch once promoted, for every running
    job has left level 0 by then.
    """

    @initialize(
        batch=st.integers(1, 4),
        levels=st.integers(2, 6),
        steady=st.integers(2, 6),
        limit=st.integers(1, 200),
        promotions=st.sampled_from([None, 1, 2]),
        skip_join=st.booleans(),
    )
    def build(self, batch, levels, steady, limit, promotions, skip_join):
        self.batch_limit, self.limit_s, self.promotions = batch, limit * TICK_S, promotions
        policy = SkipJoinMlfq(
            QuantumLadder(TICK_S, 2.0, levels),
            skip_join=skip_join,
            starvation_limit_s=self.limit_s,
            steady_levels=steady,
            pressure_jobs=2,
            max_promotions=promotions,
        )
        self.host = FakeHost()
        self.planner = StepPlanner(policy, self.host)
        self.now_s = self.step_s = 0.0
        self.arrived = 0
        self.starved_plans: dict[Job, int] = {}

    @precondition(lambda self: self.waiting() < self.batch_limit)
    @rule(prompt=st.integers(1, 100))
    def arrive(self, prompt):
        self.planner.add(make_job(f"job-{self.arrived}", prompt), self.now_s)
        self.arrived += 1

    @rule(pick=st.randoms(use_true_random=False))
    def finish(self, pick):
        if self.planner.running:
            self.planner.remove(pick.choice(self.planner.running))

    @rule(length=st.integers(1, 64), steps=st.integers(1, 8))
    def run(self, length, steps):
        for _ in range(steps):
            self.planner.observe(self.step_s, self.now_s)
            limits = self.host.limits(
                self.planner, batch_limit=self.batch_limit, token_budget=1 << 30
            )
            self.planner.plan(limits, self.now_s)
            self.check_waits()
            self.step_s = length * TICK_S
            self.now_s += self.step_s

    def waiting(self) -> int:
        return sum(job.state in WAITING for job in self.planner.jobs)

    def check_waits(self):
        """Who has waited for the limit runs in this step, or within as many as promotions take."""
        allowed = 0 if self.promotions is None else -(-self.batch_limit // self.promotions) - 1
        for job in self.planner.jobs:
            starved = job.state in WAITING and self.now_s - job.waiting_since_s >= self.limit_s
            # Without KV cache, only a first step well within the limit is promised a turn.
            starved &= job.state is JobState.PAUSED or 2 * job.first_step_s < self.limit_s
            self.starved_plans[job] = self.starved_plans.get(job, 0) + 1 if starved else 0
            assert self.starved_plans[job] <= allowed, f"I6: {job}"


BoundedLoad.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestBoundedLoad = BoundedLoad.TestCase


def test_two_prompts_finish_though_only_one_fits():
    """Promotion does not take a prompt's KV cache again and again before its first token.

    The first step is predicted anew where a job gives up its KV cache.
    """
    policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 8), starvation_limit_s=3.0)
    stage = Stage(policy, num_blocks=12)
    for name in "ab":
        stage.add(name, prompt=32, output=8).first_step_s = 8.0
    for _ in range(1000):
        stage.step(token_budget=4)
        for job in stage.plan.recomputed:
            job.first_step_s = job.next_tokens / 4
        stage.spend(1.0)
    assert sorted(stage.finished_at_s) == ["a", "b"], names(list(stage.planner.jobs))
