"""What each of the paper's figures compares, and what the paper found.

Times are scaled by the machine's decode step: 0.3 s a token, the paper's target, was ten steps of
OPT-13B on its hardware; rates are scaled by the capacity of stock vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.systems import BASELINE

OURS = "fastserve"


@dataclass(frozen=True)
class Goal:
    """What a system must keep to at the rate that it sustains.

    Attributes:
        title: as tables and plots name it.
        path: of the figure.
        steps: its limit in decode steps of an idle engine; None: the figure is a share of the
            requests, of which 95 % are needed.
    """

    title: str
    path: str
    steps: float | None


@dataclass(frozen=True)
class Setting:
    """One panel: systems on one workload and one engine.

    Attributes:
        name: also its folder's, which figures with the same points share.
        options: of `benchmarks.run`.
        paper: by system, how many times its rate FastServe sustained in the paper; the models
            are those of the figure's `note`.
    """

    name: str
    options: tuple[str, ...]
    goal: Goal
    systems: tuple[str, ...] = (BASELINE, OURS)
    paper: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PaperFigure:
    """A figure: `requests` a point, enough for a queue to build up at its batch."""

    title: str
    note: str
    settings: tuple[Setting, ...]
    requests: int = 400


MEAN = Goal("mean normalized latency, 10 steps", "normalized_ms.mean", 10)
P95 = Goal("P95 normalized latency, 10 steps", "normalized_ms.p95", 10)
LARGE_BATCH = Goal("mean normalized latency, 8.3 steps", "normalized_ms.mean", 0.25 / 0.03)

_SHAREGPT = ("--workload", "sharegpt", "--batch", "16")
_ALPACA = ("--workload", "alpaca", "--batch", "16")
_SWAP_MODES = (BASELINE, OURS, "fastserve-reactive", "fastserve-recompute")
_POLICIES = (BASELINE, "fixed-priority", "mlfq", OURS)


def _targets(level: str, what: str) -> Goal:
    return Goal(f"95 % of requests within {what}", f"within_target.{level}", None)


def _ratio(prompts: str, outputs: str) -> tuple[str, ...]:
    return (*_SHAREGPT, "--scale-prompts", prompts, "--scale-outputs", outputs)


_UP_TO = {BASELINE: "up to 8.9", "mlfq": "up to 1.87", "fixed-priority": "up to 13.9"}

FIGURES: dict[int, PaperFigure] = {
    11: PaperFigure(
        "Mean latency at batch 16",
        "paper: OPT-13B / 66B / 175B, against its own engine in order of arrival",
        (
            Setting("sharegpt-b16", _SHAREGPT, MEAN, paper={BASELINE: "2.03 / 2.24 / 2.43"}),
            Setting("alpaca-b16", _ALPACA, MEAN, paper={BASELINE: "1.98 / 1.70 / 1.63"}),
        ),
    ),
    12: PaperFigure(
        "Tail latency at batch 16",
        "paper: OPT-13B / 66B / 175B, against its own engine in order of arrival",
        (Setting("sharegpt-b16", _SHAREGPT, P95, paper={BASELINE: "1.96 / 2.83 / 1.49"}),),
    ),
    13: PaperFigure(
        "Requests within targets of time to first token and of time a token",
        "paper: OPT-13B; 1.55, 3.1 and 6.2 s to the first token, 0.15, 0.3 and 0.6 s a token",
        (
            Setting("sharegpt-b16", _SHAREGPT, _targets("tight", "52 and 5 steps")),
            Setting("sharegpt-b16", _SHAREGPT, _targets("middle", "103 and 10 steps")),
            Setting("sharegpt-b16", _SHAREGPT, _targets("loose", "207 and 20 steps")),
        ),
    ),
    14: PaperFigure(
        "Large batches",
        "paper: OPT-13B, 0.25 s a token, against its own engine in order of arrival",
        (
            Setting(
                "sharegpt-b64",
                ("--workload", "sharegpt", "--batch", "64"),
                LARGE_BATCH,
                paper={BASELINE: "1.29"},
            ),
            Setting(
                "sharegpt-b128",
                ("--workload", "sharegpt", "--batch", "128"),
                LARGE_BATCH,
                paper={BASELINE: "1.17"},
            ),
        ),
        requests=1200,
    ),
    16: PaperFigure(
        "Schedulers over the ratio of prompt to output lengths",
        "paper: the best of its ratios; here ShareGPT's lengths, prompts and outputs scaled",
        (
            Setting("ratio-prompts-quarter", _ratio("0.25", "1"), MEAN, _POLICIES, _UP_TO),
            Setting("ratio-sharegpt", _ratio("1", "1"), MEAN, _POLICIES, _UP_TO),
            Setting("ratio-outputs-quarter", _ratio("1", "0.25"), MEAN, _POLICIES, _UP_TO),
            Setting("ratio-prompts-fourfold", _ratio("4", "0.25"), MEAN, _POLICIES, _UP_TO),
        ),
    ),
    17: PaperFigure(
        "KV cache that has to leave: swapped ahead of need, when needed, or computed again",
        "paper: OPT-13B, so copies cost a quarter of prefilling; here at batch 64, KV cache short",
        (
            Setting(
                "sharegpt-kv",
                ("--workload", "sharegpt", "--regime", "kv", "--copy-ratio", "0.25"),
                MEAN,
                _SWAP_MODES,
                {"fastserve-reactive": "1.61", "fastserve-recompute": "2.69"},
            ),
        ),
    ),
}
