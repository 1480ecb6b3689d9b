"""Builds the policy that a configuration names."""

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.base import Fcfs, FixedPriority, Policy
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder

# Batches of waiting jobs beyond which the levels below the steady ones open. Simulated on
# ShareGPT lengths, batch 16: 1 opens them at load 1.0 already, 2 opens them too late at 1.2.
_PRESSURE_BATCHES = 1.5
# Promotions: one for so many batch places, in one step of so many. Starvation prevention may cost
# no more swaps than that: each promotion is followed by half a dozen demotions and some swaps.
_PLACES_A_PROMOTION = 64
_PROMOTION_INTERVAL = 4


def make_ladder(config: FastServeConfig, base_s: float) -> QuantumLadder:
    """The configured ladder; `base_s` seconds is used where the configuration names no base."""
    return QuantumLadder(config.base_quantum_s or base_s, config.quantum_ratio, config.num_levels)


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
