"""A calm engine is planned now and then, and steps as if it were planned always."""

import random

import pytest
from vllm.v1.core.sched.interface import PauseState

from fastserve_vllm import standing_plan

pytestmark = pytest.mark.host_versions


@pytest.fixture
def plans(monkeypatch):
    """Counts the plans that an engine makes from when it is called on."""

    def watch(engine):
        planner, made = engine.scheduler.planner, []
        plan = planner.plan

        def counted(*args):
            made.append(plan(*args))
            return made[-1]

        monkeypatch.setattr(planner, "plan", counted)
        return made

    return watch


def calm(make_engine, plans, **options):
    """An engine with two of four places taken, both for long, and its plans from now on."""
    engine = make_engine(max_num_seqs=4, **options)
    for name in "ab":
        engine.add(name, 10, 900)
    for _ in range(100):
        engine.step()
    return engine, plans(engine)


def test_a_calm_engine_plans_one_step_in_sixteen(make_engine, plans):
    """In the last level nothing happens for ever, and every step serves both."""
    engine, made = calm(make_engine, plans, fastserve={"num_levels": 3})
    assert [engine.step() for _ in range(160)] == [{"a": 1, "b": 1}] * 160
    assert len(made) == 10


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_news_are_planned_in_the_very_next_step(make_engine, plans, async_scheduling):
    """Whoever comes is in the next step, and whoever leaves is in none."""
    engine, made = calm(
        make_engine, plans, fastserve={"num_levels": 3}, async_scheduling=async_scheduling
    )
    engine.add("c", 7, 50)
    assert engine.step()["c"] == 7
    engine.abort("a")
    assert "a" not in engine.step()
    assert len(made) >= 2
    engine.scheduler.check_integrity()


def test_a_pause_is_planned(make_engine, plans):
    """While nothing new may start, every step is planned."""
    engine, made = calm(make_engine, plans, fastserve={"num_levels": 3})
    engine.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(5):
        engine.step()
    assert len(made) == 5


def test_scarce_blocks_are_planned(make_engine, plans):
    """Near the end of the device's blocks every step looks at them."""
    engine, made = calm(make_engine, plans, num_blocks=11, fastserve={"num_levels": 3})
    for _ in range(5):
        engine.step()
    assert len(made) == 5


def served(make_engine, plans, seed, **options):
    """Everything that steps do with a random load that leaves places free most of the time.

    Returns: what they did, and how many of them were planned.
    """
    dice = random.Random(seed)
    engine = make_engine(max_num_seqs=4, num_blocks=200, **options)
    made = plans(engine)
    policy, names, seen = engine.scheduler.planner.policy, [], []
    for step in range(1500):
        if dice.random() < 0.02:
            names.append(f"r{step}")
            engine.add(names[-1], dice.randint(1, 60), dice.randint(1, 200))
        if names and dice.random() < 0.003:
            engine.abort(dice.choice(names))
        seen.append((engine.step(), tuple(policy.level_sizes), policy.turns, policy.demotions))
        if step % 50 == 0:
            engine.scheduler.check_integrity()
    engine.drain()
    counters = engine.scheduler.planner.counters
    return (seen, counters.started, counters.preempted, engine.outputs.keys()), len(made)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_steps_are_those_of_an_engine_that_always_plans(
    make_engine, plans, monkeypatch, seed, async_scheduling
):
    """Who runs, who is demoted when, who gets a turn: all the same."""
    options = {"async_scheduling": async_scheduling, "fastserve": {"max_token_gap_s": 0.02}}
    skipping, few = served(make_engine, plans, seed, **options)
    monkeypatch.setattr(standing_plan, "_MOST_STEPS", 1)
    planning, many = served(make_engine, plans, seed, **options)
    assert skipping == planning
    assert few < 0.7 * many
