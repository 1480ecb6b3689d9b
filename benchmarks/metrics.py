"""Every figure of a run, from its request records. Durations come out in milliseconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import RequestRecord

Figures: TypeAlias = dict[str, Any]

PERCENTILES = (50, 95, 99)
# Enough of a distribution to draw it.
QUANTILES = tuple(range(101))
# Targets of time per output token and of time to first token, in decode steps of an idle engine.
# The paper's figure 13 asks for 0.15, 0.3 and 0.6 s a token and 1.55, 3.1 and 6.2 s to the first
# one, where ten decode steps take 0.3 s.
TARGETS_STEPS = {"tight": (5, 51.7), "middle": (10, 103.3), "loose": (20, 206.7)}
# Output tokens, both ends included.
BUCKETS = (("1-10", 1, 10), ("11-100", 11, 100), ("101-500", 101, 500), ("500+", 501, math.inf))


class Idle(Protocol):
    """What requests take on an idle engine."""

    @property
    def token_s(self) -> float:
        """Seconds of a decode step."""
        ...

    def __call__(self, prompt_tokens: int, output_tokens: int) -> float:
        """Latency of such a request, in seconds."""
        ...


def figures_of(records: Sequence[RequestRecord], idle: Idle) -> Figures:
    """Compute all figures of a run; `idle` is the reference of slowdowns and targets."""
    if not records:
        raise ValueError("a run without requests has no figures")
    gaps = [gaps_s(record) for record in records]
    samples = {
        "ttft_ms": [r.ttft_s for r in records],
        "longest_gap_ms": [g.max() for g in gaps if g.size],
        "e2e_ms": [r.e2e_s for r in records],
        "normalized_ms": [r.normalized_s for r in records],
    }
    return {
        **_volume(records),
        "tpot_ms": _spread_ms([tpot_s(r) for r in records if r.output_tokens > 1]),
        "itl_ms": _spread_ms(np.concatenate(gaps)),
        **{name: _spread_ms(values) for name, values in samples.items()},
        "slowdown": _slowdown_by_bucket(records, idle),
        "within_target": _within_target(records, idle.token_s),
        "quantiles": {name: _quantiles_ms(values) for name, values in samples.items() if values},
    }


def gaps_s(record: RequestRecord) -> NDArray[np.float64]:
    """Inter-token latencies of one request, empty for a single token."""
    return np.diff(np.asarray(record.token_times_s, dtype=np.float64))


def tpot_s(record: RequestRecord) -> float:
    """Mean time per output token after the first."""
    return (record.e2e_s - record.ttft_s) / (record.output_tokens - 1)


def duration_s(records: Sequence[RequestRecord]) -> float:
    """From the first arrival to the last token."""
    return max(r.token_times_s[-1] for r in records) - min(r.arrival_s for r in records)


def requests_per_s(records: Sequence[RequestRecord]) -> float:
    """Finished requests per second; with all present at the start, the capacity."""
    return len(records) / duration_s(records)


def sustained_rate(
    rates: Sequence[float], latencies: Sequence[float], target: float
) -> float | None:
    """The rate at which latency first exceeds `target`, interpolated between two points.

    The logarithm of the latency is taken as linear in the rate between them. Returns None when
    no two neighbouring points enclose the target: the answer lies outside what was measured.
    """
    points = sorted(zip(rates, latencies, strict=True))
    for (low, within), (high, above) in itertools.pairwise(points):
        if within <= target < above:
            share = math.log(target / within) / math.log(above / within)
            return low + share * (high - low)
    return None


def _volume(records: Sequence[RequestRecord]) -> Figures:
    seconds = duration_s(records)
    output_tokens = sum(r.output_tokens for r in records)
    return {
        "requests": len(records),
        "prompt_tokens": sum(r.prompt_tokens for r in records),
        "output_tokens": output_tokens,
        "duration_s": seconds,
        "requests_per_s": len(records) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
    }


def _spread_ms(seconds: Sequence[float] | NDArray[np.float64]) -> Figures | None:
    return _spread(np.asarray(seconds, dtype=np.float64) * 1000.0)


def _spread(values: NDArray[np.float64]) -> Figures | None:
    """Mean, percentiles and maximum; None when there is nothing to describe."""
    if not values.size:
        return None
    percentiles = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)}
    return {"mean": float(values.mean()), **named, "max": float(values.max())}


def _quantiles_ms(seconds: Sequence[float]) -> list[float]:
    return [1000 * float(value) for value in np.percentile(seconds, QUANTILES)]


def _within_target(records: Sequence[RequestRecord], step_s: float) -> Figures:
    """The share of the requests that meet both targets."""
    return {
        name: sum(r.ttft_s < first * step_s and _token_s(r) < token * step_s for r in records)
        / len(records)
        for name, (token, first) in TARGETS_STEPS.items()
    }


def _token_s(record: RequestRecord) -> float:
    return tpot_s(record) if record.output_tokens > 1 else 0.0


def _slowdown_by_bucket(records: Sequence[RequestRecord], idle: Idle) -> Figures:
    """Latency over the latency alone, for each bucket of output length."""
    buckets: Figures = {}
    for name, low, high in BUCKETS:
        members = [r for r in records if low <= r.output_tokens <= high]
        slowdowns = [r.e2e_s / idle(r.prompt_tokens, r.output_tokens) for r in members]
        spread = _spread(np.asarray(slowdowns, dtype=np.float64))
        buckets[name] = {"requests": len(members), **(spread or {})}
    return buckets


def preemption_figures(counters: Mapping[str, Any]) -> Figures:
    """Preemptions by what becomes of the KV cache; the engine and its server name them alike."""
    by_kind: Mapping[str, float] = counters.get("preempted") or counters.get("preemptions") or {}
    kinds = dict.fromkeys(("paused", "recomputed"), 0.0)
    for labels, times in by_kind.items():
        for mode in kinds.keys() & set(labels.replace(" ", "").split(",")):
            kinds[mode] += times
    return {**kinds, "by_vllm": counters.get("vllm_preemptions", 0)}


def swap_figures(counters: Mapping[str, Any], stepping_s: float) -> Figures:
    """What KV swap moved and what it cost; `stepping_s` seconds were spent in steps."""
    swap = counters.get("swap", {})
    copied = swap.get("bytes", {})
    waited_s = swap.get("waited_s", 0.0)
    return {
        "outs_ahead": swap.get("outs", 0) - swap.get("urgent_outs", 0),
        "outs_urgent": swap.get("urgent_outs", 0),
        "ins_ahead": swap.get("ins", 0) - swap.get("urgent_ins", 0),
        "ins_urgent": swap.get("urgent_ins", 0),
        "mib_out": copied.get("out", 0) / (1 << 20),
        "mib_in": copied.get("in", 0) / (1 << 20),
        # Of the blocks that left the device, those that had to be copied to the host.
        "first_out_copied": _share(swap, "first_out_copied", "first_out_blocks"),
        "again_out_copied": _share(swap, "again_out_copied", "again_out_blocks"),
        "copy_wait_ms": 1000 * waited_s,
        "copy_wait_share": waited_s / stepping_s if stepping_s else 0.0,
    }


def _share(counters: Mapping[str, int], part: str, whole: str) -> float | None:
    return counters[part] / counters[whole] if counters.get(whole) else None
