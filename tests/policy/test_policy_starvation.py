"""Invariant I6: how long a job can wait for its next turn; and that turns lead somewhere."""

import math

import pytest
from fake_host import TICK_S, FakeHost, Stage, make_job, names
from fake_swap import MODES, SwapStage
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from reference import naive_patience_s

from fastserve_vllm.policy.ageing import AbsoluteAgeing, RelativeAgeing
from fastserve_vllm.policy.first_tokens import FirstTokenShare
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.lengths import AnswerLengths
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.quantum import QuantumLadder

WAITING = (JobState.QUEUED, JobState.PAUSED)


class BoundedLoad(RuleBasedStateMachine):
    """One priority class, few waiting jobs, and nothing but the batch limit binds.

    Subclasses build the policy, and say how many plans may leave out a job that is due.
    """

    policy: SkipJoinMlfq
    batch_limit: int
    most_waiting: int
    longest_prompt: int
    shortest_step: int

    def begin(self):
        self.host = FakeHost()
        self.planner = StepPlanner(self.policy, self.host)
        self.now_s = self.step_s = 0.0
        self.arrived = 0
        self.late_plans: dict[Job, int] = {}

    @precondition(lambda self: self.waiting() < self.most_waiting)
    @rule(prompt=st.integers(1, 100))
    def arrive(self, prompt):
        prompt = min(prompt, self.longest_prompt)
        self.planner.add(make_job(f"job-{self.arrived}", prompt), self.now_s)
        self.arrived += 1

    @rule(pick=st.randoms(use_true_random=False))
    def finish(self, pick):
        if self.planner.running:
            self.planner.remove(pick.choice(self.planner.running))

    @rule(length=st.integers(0, 64), steps=st.integers(1, 8))
    def run(self, length, steps):
        for _ in range(steps):
            self.planner.observe(self.step_s, self.now_s)
            limits = self.host.limits(
                self.planner, batch_limit=self.batch_limit, token_budget=1 << 30
            )
            self.planner.plan(limits, self.now_s)
            self.check_waits()
            self.step_s = (self.shortest_step + length) * TICK_S
            self.now_s += self.step_s

    def waiting(self) -> int:
        return sum(job.state in WAITING for job in self.planner.jobs)

    def check_waits(self):
        """Who has waited for its patience runs in this step, or as soon as is promised."""
        for job in self.planner.jobs:
            late = job.state in WAITING and self.is_due(job)
            self.late_plans[job] = self.late_plans.get(job, 0) + 1 if late else 0
            assert self.late_plans[job] <= self.most_late_plans(), f"I6: {job}"

    def waited_s(self, job: Job) -> float:
        return self.now_s - job.waiting_since_s

    def is_due(self, job: Job) -> bool:
        raise NotImplementedError

    def most_late_plans(self) -> int:
        raise NotImplementedError


class PromotedInTime(BoundedLoad):
    """The absolute rule: at most a batch waits, and a step takes at least the base quantum.

    Then whoever waits fits into the batch once promoted, for every running job has left level 0
    by then: nobody has grace there, where skip-join has a level between the first and the last.
    """

    @initialize(
        batch=st.integers(1, 4),
        levels=st.integers(3, 6),
        limit=st.integers(1, 200),
        weight=st.sampled_from([0.0, 4.0]),
        skip_join=st.booleans(),
        learns=st.booleans(),
    )
    def build(self, batch, levels, limit, weight, skip_join, learns):
        self.batch_limit = self.most_waiting = batch
        self.limit_s, self.longest_prompt, self.shortest_step = limit * TICK_S, 100, 1
        self.policy = SkipJoinMlfq(
            QuantumLadder(TICK_S, 2.0, levels if skip_join else levels - 1),
            skip_join=skip_join,
            ageing=AbsoluteAgeing(self.limit_s),
            service_weight=weight,
            lengths=AnswerLengths() if learns else None,
        )
        self.begin()

    def is_due(self, job: Job) -> bool:
        """Without KV cache, only a first step well within the limit is promised a turn."""
        endless = job.state is JobState.QUEUED and 2 * job.first_step_s >= self.limit_s
        return self.waited_s(job) >= self.limit_s and not endless

    def most_late_plans(self) -> int:
        return 0


class TurnsInTime(BoundedLoad):
    """Relative ageing: n jobs wait at most, m have a turn at a time, a turn takes k steps at most.

    When a job falls due, m turns may be under way, each with k - 1 steps to go, and n - 1 jobs may
    have been due before it, each with a turn of k steps to come. That work is shared by m, and
    no turn stands idle meanwhile: so it is in the batch after (k - 1) + floor((n - 1) k / m)
    plans at the latest. Where no more jobs wait than have a turn at a time, and all of them have
    KV cache (k = 1), that is at once.
    """

    @initialize(
        batch=st.integers(1, 4),
        turns=st.integers(1, 4),
        waiting=st.integers(1, 8),
        ratio=st.sampled_from([0.0, 1.0, 10.0]),
        gap=st.integers(1, 60),
        limit=st.integers(1, 200),
        longest=st.integers(1, 24),
        shortest=st.sampled_from([1, 8, 30]),
        levels=st.integers(1, 6),
        skip_join=st.booleans(),
        share=st.sampled_from([None, 0.125, 0.5]),
        learns=st.booleans(),
    )
    def build(
        self,
        batch,
        turns,
        waiting,
        ratio,
        gap,
        limit,
        longest,
        shortest,
        levels,
        skip_join,
        share,
        learns,
    ):
        self.batch_limit, self.most_waiting = batch, waiting
        self.longest_prompt, self.shortest_step = longest, shortest
        self.most_turns = min(turns, batch)
        self.ageing = RelativeAgeing(
            ratio=ratio, gap_s=gap * TICK_S, limit_s=limit * TICK_S, most_turns=self.most_turns
        )
        self.policy = SkipJoinMlfq(
            QuantumLadder(TICK_S, 2.0, levels),
            skip_join=skip_join,
            ageing=self.ageing,
            service_weight=4.0,
            lengths=AnswerLengths() if learns else None,
            first_tokens=FirstTokenShare(share) if share else None,
        )
        self.begin()

    def is_due(self, job: Job) -> bool:
        patience_s = naive_patience_s(self.ageing, TICK_S, job, job.served_s)
        # I6: with KV cache on the device the gap bound, and never more than the limit.
        bound_s = self.ageing.gap_s if job.state is JobState.PAUSED else self.ageing.limit_s
        assert patience_s <= min(bound_s, self.ageing.limit_s)
        return self.waited_s(job) >= patience_s

    def most_late_plans(self) -> int:
        turn_steps = math.ceil(self.longest_prompt / self.shortest_step) + 1
        before = (self.most_waiting - 1) * turn_steps // self.most_turns
        return turn_steps - 1 + before

    @rule(steps=st.integers(1, 8))
    def run_with_turns(self, steps):
        """Who has run for as long as its turn says has none any more."""
        self.run(length=0, steps=steps)
        turns = [job for job in self.planner.jobs if job.turn_s is not None]
        assert len(turns) <= self.most_turns
        for job in turns:
            # m <= B: nothing keeps a job from its turn, so it runs.
            assert job.state is JobState.RUNNING
            assert self.policy.attained_service_s(job) >= 0


for machine in (PromotedInTime, TurnsInTime):
    machine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestPromotedInTime = PromotedInTime.TestCase
TestTurnsInTime = TurnsInTime.TestCase


RULES = [
    AbsoluteAgeing(3.0),
    RelativeAgeing(ratio=10.0, gap_s=0.4, limit_s=3.0, most_turns=2),
    RelativeAgeing(ratio=0.0, gap_s=0.4, limit_s=3.0, most_turns=1),
]


def finishes(stage: Stage, predict, **options: object) -> list[str]:
    """Run for a thousand steps of a second; who has finished.

    The first step is predicted anew where a job gives up its KV cache.
    """
    for _ in range(1000):
        stage.step(**options)
        for job in stage.plan.recomputed:
            job.first_step_s = predict(job)
        stage.spend(1.0)
    return sorted(stage.finished_at_s)


@pytest.mark.parametrize("ageing", RULES)
def test_two_prompts_finish_though_only_one_fits(ageing):
    """Ageing does not take a prompt's KV cache again and again before its first token."""
    stage = Stage(SkipJoinMlfq(QuantumLadder(1.0, 2.0, 8), ageing=ageing), num_blocks=12)
    for name in "ab":
        stage.add(name, prompt=32, output=8).first_step_s = 8.0
    done = finishes(stage, lambda job: job.next_tokens / 4, token_budget=4)
    assert done == ["a", "b"], names(list(stage.planner.jobs))


@pytest.mark.parametrize("error", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ageing", RULES[1:])
def test_two_long_answers_finish_though_only_one_fits(ageing, mode, error):
    """A turn that costs a recomputation, or copies, leads to a token at least.

    So it does where the first step is predicted to be shorter than it is.
    """
    stage = SwapStage(
        SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4), ageing=ageing),
        mode,
        num_blocks=20,
        host_blocks=40,
        block_copy_s=0.01,
        copy_steps=1,
    )
    for name in "ab":
        stage.add(name, prompt=32, output=40).first_step_s = 8.0 * error
    done = finishes(stage, lambda job: error * job.next_tokens / 4, token_budget=4)
    assert done == ["a", "b"], names(list(stage.planner.jobs))
