"""Builds the policy that a configuration names."""

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.base import Fcfs, FixedPriority, Policy
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder


def make_ladder(config: FastServeConfig, base_s: float) -> QuantumLadder:
    """The configured ladder; `base_s` seconds is used where the configuration names no base."""
    return QuantumLadder(
        config.base_quantum_s or base_s, config.quantum_ratio, config.num_levels
    )


def make_policy(config: FastServeConfig, base_s: float) -> Policy:
    """The configured policy, with `base_s` seconds as the smallest step known so far."""
    if config.policy == "fcfs":
        return Fcfs()
    if config.policy == "fixed-priority":
        return FixedPriority()
    return SkipJoinMlfq(
        make_ladder(config, base_s),
        skip_join=config.policy == "fastserve",
        starvation_limit_s=config.starvation_limit_s,
    )
