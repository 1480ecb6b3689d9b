"""Same inputs, same plans."""

import random

import pytest
from fake_host import TICK_S, FakeHost, Stage, make_job, names

from fastserve_vllm.policy.ageing import AbsoluteAgeing, Ageing, RelativeAgeing
from fastserve_vllm.policy.first_tokens import FirstTokenShare
from fastserve_vllm.policy.lengths import AnswerLengths
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.plan import StepPlanner
from fastserve_vllm.policy.quantum import QuantumLadder

AGEING = [
    AbsoluteAgeing(40 * TICK_S),
    RelativeAgeing(ratio=4.0, gap_s=8 * TICK_S, limit_s=40 * TICK_S, most_turns=2),
]


def made(ageing: Ageing) -> SkipJoinMlfq:
    """A policy with all that it may have."""
    return SkipJoinMlfq(
        QuantumLadder(TICK_S, 2.0, 6),
        ageing=ageing,
        service_weight=4.0,
        lengths=AnswerLengths(),
        first_tokens=FirstTokenShare(0.25),
    )


def run(seed: int, ageing: Ageing, **options: object) -> list[tuple[str, ...]]:
    """Plans of a busy trace: arrivals, stalls, finishes, and ageing."""
    dice = random.Random(seed)
    policy = made(ageing)
    host = FakeHost(num_blocks=90)
    planner = StepPlanner(policy, host)
    clutter, plans, now_s = [], [], 0.0
    for step in range(300):
        for number in range(dice.randrange(3)):
            clutter.append(bytearray(dice.randrange(1, 999)))
            job = make_job(f"{step}-{number}", dice.randint(1, 30), dice.randint(1, 30))
            planner.add(job, now_s)
        host.stalled = set(dice.sample(list(planner.running), len(planner.running) // 2))
        planner.observe(4 * TICK_S, now_s)
        limits = host.limits(planner, batch_limit=dice.randint(2, 12), token_budget=64, **options)
        resident = [job for job in planner.jobs if job.handle.blocks]
        plan = planner.plan(limits, now_s)
        plans.append(
            tuple(names(part) for part in (plan.batch, plan.started, plan.paused, plan.recomputed))
        )
        host.move(plan, planner, now_s)
        for job in host.run(plan, planner, limits, resident):
            planner.remove(job)
        now_s += 4 * TICK_S
    return plans


@pytest.mark.parametrize("ageing", AGEING)
def test_plans_do_not_depend_on_memory_addresses(ageing):
    """Two runs of a trace give the same plans, in content and in order."""
    for seed in range(3):
        for overlapping in (False, True):
            first = run(seed, ageing, overlapping=overlapping)
            keep = [make_job("x") for _ in range(seed * 7 + 1)]
            assert run(seed, ageing, overlapping=overlapping) == first
            del keep


def test_the_trace_preempts():
    """The trace of these tests pauses, recomputes and resumes."""
    plans = run(0, AGEING[1], overlapping=True)
    assert any(paused for _, _, paused, _ in plans)
    assert any(recomputed for _, _, _, recomputed in plans)


@pytest.mark.parametrize("ageing", AGEING)
def test_plans_do_not_depend_on_true_output_lengths(ageing):
    """Until a job finishes, a trace of short answers and one of long answers plan the same (I8)."""
    assert answers_of(40, ageing) == answers_of(4000, ageing)


def answers_of(output: int, ageing: Ageing) -> list[str]:
    """Batches of the first 40 steps of jobs with answers this long."""
    policy = made(ageing)
    stage = Stage(policy, num_blocks=60)
    batches = []
    for step in range(40):
        stage.add(f"{step}", prompt=1 + step % 7, output=output)
        batches.append(stage.step(batch_limit=4))
        stage.spend(2 * TICK_S)
    assert not stage.finished_at_s
    return batches
