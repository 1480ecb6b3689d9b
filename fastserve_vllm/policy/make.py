"""Builds the policy that a configuration names."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

from fastserve_vllm.config import (
    POLICY_NAMES,
    AgeingRule,
    ConfigError,
    FastServeConfig,
    Objective,
)
from fastserve_vllm.policy.ageing import AbsoluteAgeing, Ageing, RelativeAgeing
from fastserve_vllm.policy.base import Fcfs, FixedPriority, Policy
from fastserve_vllm.policy.first_tokens import FirstTokenShare
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.lengths import AnswerLengths
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder
from fastserve_vllm.policy.step_time import StepShape, StepTimeModel

T = TypeVar("T")

# What a reader does not notice: two tokens at the five a second that people read.
_READING_GAP_S = 0.4
# On an engine whose steps are slow, a gap shorter than this would leave no time for anything else.
_GAP_QUANTA = 32.0


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What an objective sets where the configuration does not.

    Attributes:
        turn_share: share of the batch places that turns may take at a time.
    """

    num_levels: int = 7
    quantum_ratio: float = 2.1
    service_weight: float = 50.0
    first_token_share: float = 1.0
    learn_lengths: bool = True
    ageing: AgeingRule = "relative"
    ageing_ratio: float = 20.0
    starvation_limit_s: float = 6.0
    turn_share: float = 0.25


ARRANGEMENTS: dict[Objective, Arrangement] = {
    "balanced": Arrangement(),
    "smooth": Arrangement(ageing_ratio=0.0, turn_share=0.5),
    "paper": Arrangement(
        num_levels=64,
        quantum_ratio=2.0,
        service_weight=0.0,
        learn_lengths=False,
        ageing="absolute",
        starvation_limit_s=0.3,
    ),
}

# A new base moves the ladder only when it differs by this much: re-basing costs a pass over the
# batch, and what is learned creeps.
_REBASE_TOLERANCE = 0.05


def make_ladder(config: FastServeConfig, base_s: float) -> QuantumLadder:
    """The configured ladder; `base_s` seconds is used where the configuration names no base."""
    preset = ARRANGEMENTS[config.objective]
    return QuantumLadder(
        config.base_quantum_s or base_s,
        _chosen(config.quantum_ratio, preset.quantum_ratio),
        _chosen(config.num_levels, preset.num_levels),
    )


def make_ageing(config: FastServeConfig, batch_limit: int) -> Ageing | None:
    """The configured ageing.

    Args:
        config: the user's choices.
        batch_limit: jobs in a batch.
    """
    preset = ARRANGEMENTS[config.objective]
    if config.starvation_limit_s == "off":
        return None
    limit_s = _chosen(config.starvation_limit_s, preset.starvation_limit_s)
    if _chosen(config.ageing, preset.ageing) == "absolute":
        return AbsoluteAgeing(limit_s)
    return RelativeAgeing(
        ratio=_chosen(config.ageing_ratio, preset.ageing_ratio),
        gap_s=_chosen(config.max_token_gap_s, _READING_GAP_S),
        gap_quanta=_GAP_QUANTA if config.max_token_gap_s is None else 0.0,
        limit_s=limit_s,
        most_turns=max(int(preset.turn_share * batch_limit), 1),
    )


def _chosen(value: T | None, default: T) -> T:
    return default if value is None else value


def base_quantum_s(config: FastServeConfig, step_time: StepTimeModel, batch_limit: int) -> float:
    """Seconds of the highest level's quantum, as far as they are known.

    A quantum of one is a token of each job of a full batch, so that the levels mean as many tokens
    whatever the batch. The paper's arrangement takes the smallest step (section 4.1).
    """
    if config.base_quantum_s is not None:
        return config.base_quantum_s
    alone_s = step_time.min_decode_step_s
    if config.objective == "paper":
        return alone_s or step_time.predict_s(StepShape(0, 1))
    return max(step_time.predict_s(StepShape(0, batch_limit)), alone_s or 0.0)


def rebase(
    policy: Policy,
    config: FastServeConfig,
    step_time: StepTimeModel,
    batch_limit: int,
    running: Iterable[Job],
) -> None:
    """Let the ladder follow the step times, unless its base is configured."""
    if not isinstance(policy, SkipJoinMlfq) or step_time.min_decode_step_s is None:
        return
    base_s = base_quantum_s(config, step_time, batch_limit)
    if abs(base_s / policy.ladder.base_s - 1) > _REBASE_TOLERANCE:
        policy.set_ladder(make_ladder(config, base_s), running)


def describe(policy: Policy, config: FastServeConfig) -> str:
    """The arrangement in a few words, for a log line."""
    if not isinstance(policy, SkipJoinMlfq):
        return "no levels"
    ladder, ageing = policy.ladder, policy.ageing
    base = f"{config.base_quantum_s:g} s" if config.base_quantum_s else "learned"
    if ageing is None:
        rule = "no ageing"
    elif isinstance(ageing, AbsoluteAgeing):
        rule = f"promotion after {ageing.limit_s:g} s"
    else:
        rule = f"a turn after {policy.gap_s:.3g} to {ageing.limit_s:g} s"
    return (
        f"objective {config.objective}, {ladder.num_levels} levels, quantum ratio "
        f"{ladder.ratio:g}, base quantum {base}, {rule}"
    )


def make_policy(config: FastServeConfig, base_s: float, batch_limit: int) -> Policy:
    """The configured policy.

    Args:
        config: the user's choices.
        base_s: seconds of the highest level, where the configuration names none.
        batch_limit: jobs in a batch.

    Raises:
        ConfigError: it names a policy of the user's own that cannot be used.
    """
    if config.policy not in POLICY_NAMES:
        return own_policy(config.policy)
    if config.policy == "fcfs":
        return Fcfs()
    if config.policy == "fixed-priority":
        return FixedPriority()
    preset = ARRANGEMENTS[config.objective]
    learns = _chosen(config.learn_lengths, preset.learn_lengths)
    share = _chosen(config.first_token_share, preset.first_token_share)
    return SkipJoinMlfq(
        make_ladder(config, base_s),
        skip_join=config.policy == "fastserve",
        ageing=make_ageing(config, batch_limit),
        service_weight=_chosen(config.service_weight, preset.service_weight),
        lengths=AnswerLengths() if learns else None,
        first_tokens=FirstTokenShare(share) if share < 1 else None,
    )


def own_policy(name: str) -> Policy:
    """Make a policy of the user's own.

    Args:
        name: `module:Class`; the class takes no arguments.

    Raises:
        ConfigError: the module cannot be imported, has no such class, or the class is no policy.
    """
    module_name, _, class_name = name.partition(":")
    field = "fastserve_config.policy"
    try:
        found = getattr(import_module(module_name), class_name, None)
    except ImportError as error:
        raise ConfigError(f"{field}: {module_name} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{field}: {module_name} has no class {class_name}")
    try:
        policy: Policy = found()
    except TypeError as error:
        raise ConfigError(f"{field}: {name} must be made without arguments: {error}") from error
    missing = [n for n in vars(Policy) if not n.startswith("_") and not hasattr(policy, n)]
    if missing:
        raise ConfigError(
            f"{field}: {name} lacks {', '.join(missing)} of fastserve_vllm.policy.base.Policy; a "
            "subclass of StaticPolicy in the same module needs only key"
        )
    return policy
