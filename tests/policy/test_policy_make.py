"""What an objective means, and what the configuration may change of it."""

import math

import pytest

from fastserve_vllm.config import ConfigError, FastServeConfig
from fastserve_vllm.policy.ageing import AbsoluteAgeing, RelativeAgeing
from fastserve_vllm.policy.base import StaticPolicy
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.make import (
    ARRANGEMENTS,
    base_quantum_s,
    make_ageing,
    make_policy,
    rebase,
)
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder
from fastserve_vllm.policy.step_time import StepTimeModel

BATCH = 16


def made(**options: object) -> SkipJoinMlfq:
    """The policy of a configuration."""
    return make_policy(FastServeConfig.parse(options), base_s=0.01, batch_limit=BATCH)


def test_the_default_is_balanced():
    """A finite ladder, turns, and a last level in which service counts."""
    policy, preset = made(), ARRANGEMENTS["balanced"]
    assert policy.ladder == QuantumLadder(0.01, preset.quantum_ratio, preset.num_levels)
    assert policy.num_levels < 16
    assert policy.skip_join
    assert policy.service_weight > 0
    assert policy.lengths.explained == 0
    assert policy.first_tokens is None
    assert isinstance(policy.ageing, RelativeAgeing)
    assert policy.ageing.ratio > 0
    assert 0 < policy.ageing.gap_s < policy.ageing.limit_s < math.inf
    assert 1 <= policy.ageing.most_turns < BATCH


def test_smooth_lets_nobody_wait_for_longer_than_the_gap():
    """Whatever a turn costs, and with more turns at a time."""
    ageing, balanced = made(objective="smooth").ageing, made().ageing
    assert isinstance(ageing, RelativeAgeing)
    assert ageing.ratio == 0
    assert (ageing.gap_s, ageing.limit_s) == (balanced.gap_s, balanced.limit_s)
    assert balanced.most_turns < ageing.most_turns <= BATCH


def test_paper_is_the_rule_of_the_paper():
    """Section 4.1: no last level to speak of, promotion to level 0 after 300 ms."""
    policy = made(objective="paper")
    assert policy.ladder == QuantumLadder(0.01, 2.0, 64)
    assert policy.ageing == AbsoluteAgeing(0.3)
    assert policy.service_weight == 0
    assert (policy.lengths, policy.first_tokens) == (None, None)
    assert policy.gap_s == math.inf


@pytest.mark.parametrize("objective", ARRANGEMENTS)
def test_every_choice_overrides_the_objective(objective):
    """Whatever the objective would set."""
    policy = made(
        objective=objective,
        num_levels=5,
        quantum_ratio=3.0,
        service_weight=7.0,
        first_token_share=0.125,
        learn_lengths=True,
        ageing="relative",
        ageing_ratio=2.0,
        starvation_limit_s=9.0,
        max_token_gap_s=0.25,
    )
    ageing = policy.ageing
    assert policy.ladder == QuantumLadder(0.01, 3.0, 5)
    assert (policy.service_weight, ageing.ratio) == (7.0, 2.0)
    assert policy.first_tokens.share == 0.125
    assert policy.lengths is not None
    assert (ageing.limit_s, ageing.gap_s, ageing.gap_quanta) == (9.0, 0.25, 0.0)
    assert made(objective=objective, ageing="absolute", starvation_limit_s=2.0).ageing == (
        AbsoluteAgeing(2.0)
    )


@pytest.mark.parametrize("objective", ARRANGEMENTS)
def test_zero_is_a_choice(objective):
    """It is not taken for nothing, nor is no."""
    policy = made(
        objective=objective,
        service_weight=0,
        first_token_share=1,
        learn_lengths=False,
        ageing="relative",
        ageing_ratio=0,
    )
    assert (policy.lengths, policy.first_tokens) == (None, None)
    assert (policy.service_weight, policy.ageing.ratio) == (0, 0)


@pytest.mark.parametrize("objective", ARRANGEMENTS)
@pytest.mark.parametrize("ageing", [None, "relative", "absolute"])
def test_off_lets_wait_for_ever(objective, ageing):
    """There is no ageing, whatever else is configured of it."""
    assert made(objective=objective, ageing=ageing, starvation_limit_s="off").ageing is None


def test_the_gap_follows_slow_steps_unless_it_is_configured():
    """A gap of a few steps would leave no time for anything else."""
    policy = made()
    short_s = policy.gap_s
    policy.set_ladder(QuantumLadder(1.0, 2.0, policy.num_levels), [])
    assert short_s < policy.gap_s
    policy = made(max_token_gap_s=0.1)
    policy.set_ladder(QuantumLadder(1.0, 2.0, policy.num_levels), [])
    assert policy.gap_s == 0.1


@pytest.mark.parametrize("batch_limit", [1, 2, 3, 16, 512])
@pytest.mark.parametrize("objective", ["balanced", "smooth"])
def test_there_is_always_a_turn_to_give(objective, batch_limit):
    """At least one at a time, and never more than there are places."""
    ageing = make_ageing(FastServeConfig(objective=objective), batch_limit)
    assert 1 <= ageing.most_turns <= batch_limit


@pytest.mark.parametrize("objective", ARRANGEMENTS)
def test_the_base_follows_the_steps(objective):
    """A step of a full batch, or the smallest one; a configured base stays, so do the levels."""
    step_time = StepTimeModel((0.02, 0.0, 0.001, 0.0), base_quantum_s=0.02, pinned=True)
    learned_s = 0.02 if objective == "paper" else 0.02 + BATCH * 0.001
    for options, base_s in [({}, learned_s), ({"base_quantum_s": 0.5}, 0.5)]:
        config = FastServeConfig(objective=objective, **options)
        assert base_quantum_s(config, step_time, BATCH) == pytest.approx(base_s)
        policy = make_policy(config, base_s=0.01, batch_limit=BATCH)
        levels = policy.num_levels
        rebase(policy, config, step_time, BATCH, [])
        assert policy.ladder.base_s == pytest.approx(base_s)
        assert policy.num_levels == levels


class ByName(StaticPolicy):
    """A policy of somebody's own."""

    def key(self, job: Job) -> tuple[float, ...]:
        return (job.priority, 0, len(job.job_id), job.arrival)


class NotMade(ByName):
    def __init__(self, argument: int) -> None:
        super().__init__()


HERE = "test_policy_make"


def test_a_policy_of_ones_own():
    """Module and class are enough."""
    policy = made(policy=f"{HERE}:ByName")
    job = Job("four", 10)
    policy.join(job, 0.0)
    assert type(policy).__name__ == "ByName"
    assert job.key == (0, 0, 4, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Any", "no_such_module cannot be imported: No module named"),
        (f"{HERE}:Nobody", f"{HERE} has no class Nobody"),
        (f"{HERE}:HERE", f"{HERE} has no class HERE"),
        (f"{HERE}:NotMade", "must be made without arguments: .*argument"),
        ("collections:Counter", "lacks num_levels, gap_s, join, .*needs only key"),
    ],
)
def test_a_policy_that_cannot_be_used(name, message):
    """The message names the field, the class, and what is missing."""
    with pytest.raises(ConfigError, match=f"^fastserve_config.policy: .*{message}"):
        made(policy=name)


@pytest.mark.parametrize("name", ["lifo", "a:b:c", ":Class", "module:", "mod ule:Class", 7])
def test_what_names_no_policy(name):
    """Neither one of ours nor `module:Class`: the message lists what there is."""
    with pytest.raises(ConfigError, match="'fixed-priority' or module:Class, a policy of your own"):
        FastServeConfig.parse({"policy": name})
