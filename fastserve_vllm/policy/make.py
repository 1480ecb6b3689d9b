"""Builds the policy that a configuration names."""

from collections.abc import Iterable

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.base import Fcfs, FixedPriority, Policy
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder
from fastserve_vllm.policy.step_time import StepTimeModel

# Batches of waiting jobs beyond which the levels below the steady ones open. Simulated on
# ShareGPT lengths, batch 16: 1 opens them at load 1.0 already, 2 opens them too late at 1.2.
_PRESSURE_BATCHES = 1.5
# Promotions: one for so many batch places, in one step of so many. Starvation prevention may cost
# no more swaps than that: each promotion is followed by half a dozen demotions and some swaps.
_PLACES_A_PROMOTION = 64
_PROMOTION_INTERVAL = 4
# A new smallest decode step moves the ladder only when it differs by this much: re-basing costs a
# pass over the batch, and measured minima creep. The first one may well be longer than the prior.
_REBASE_TOLERANCE = 0.05


def make_ladder(config: FastServeConfig, base_s: float) -> QuantumLadder:
    """The configured ladder; `base_s` seconds is used where the configuration names no base."""
    return QuantumLadder(config.base_quantum_s or base_s, config.quantum_ratio, config.num_levels)


def rebase(
    policy: Policy, config: FastServeConfig, step_time: StepTimeModel, running: Iterable[Job]
) -> None:
    """Let the base quantum follow the smallest decode step seen, unless it is configured."""
    fastest_s = step_time.min_decode_step_s
    if fastest_s is None or not isinstance(policy, SkipJoinMlfq):
        return
    if config.base_quantum_s is not None:
        return
    if abs(fastest_s / policy.ladder.base_s - 1) > _REBASE_TOLERANCE:
        policy.set_ladder(make_ladder(config, fastest_s), running)


def make_policy(config: FastServeConfig, base_s: float, batch_limit: int) -> Policy:
    """The configured policy.

    Args:
        config: the user's choices.
        base_s: seconds of the smallest step known so far.
        batch_limit: jobs in a batch.
    """
    if config.policy == "fcfs":
        return Fcfs()
    if config.policy == "fixed-priority":
        return FixedPriority()
    return SkipJoinMlfq(
        make_ladder(config, base_s),
        skip_join=config.policy == "fastserve",
        starvation_limit_s=config.starvation_limit_s,
        steady_levels=config.steady_levels,
        pressure_jobs=int(_PRESSURE_BATCHES * batch_limit),
        max_promotions=max(batch_limit // _PLACES_A_PROMOTION, 1),
        promotion_interval=_PROMOTION_INTERVAL,
    )
