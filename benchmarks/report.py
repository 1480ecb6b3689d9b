"""From runs to a summary: medians over seeds, ratios to the baseline, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from benchmarks.metrics import BUCKETS, Figures, sustained_rate
from benchmarks.systems import BASELINE

Columns: TypeAlias = tuple[tuple[str, str], ...]

# Title and path of a figure, for the printed tables and the summary.
COLUMNS: Columns = (
    ("TTFT mean ms", "ttft_ms.mean"),
    ("TTFT P95 ms", "ttft_ms.p95"),
    ("normalized mean ms", "normalized_ms.mean"),
    ("normalized P95 ms", "normalized_ms.p95"),
    ("e2e mean ms", "e2e_ms.mean"),
    ("e2e P95 ms", "e2e_ms.p95"),
    ("e2e P99 ms", "e2e_ms.p99"),
    ("longest gap P95 ms", "longest_gap_ms.p95"),
    ("output tokens/s", "output_tokens_per_s"),
)
SLOWDOWN_COLUMNS: Columns = tuple(
    (f"slowdown at {name} tokens", f"slowdown.{name}.mean") for name, _, _ in BUCKETS
)


@dataclass(frozen=True)
class RunResult:
    """One system at one load and one seed."""

    system: str
    load: float
    seed: int
    rate_rps: float
    figures: Figures
    # Digest of the whole run's output, and of each request's.
    output_digest: str
    request_digests: Mapping[str, str] = field(repr=False)
    counters: Mapping[str, Any] = field(default_factory=dict)
    # Everything that depends on the machine's speed, kept apart in virtual runs.
    wall: Mapping[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The run as it is written, without the digests of single requests."""
        document = asdict(self)
        del document["request_digests"]
        return document


@dataclass(frozen=True)
class Ratio:
    """A figure over seeds, and its ratio to the baseline at the same load and seed."""

    median: float
    low: float
    high: float
    ratio_median: float | None
    ratio_low: float | None
    ratio_high: float | None


def value_of(figures: Figures, path: str) -> float | None:
    """Read one number by its dotted path; None where the run has no such thing."""
    value: Any = figures
    for key in path.split("."):
        value = value.get(key) if value is not None else None
    return None if value is None else float(value)


def compare(runs: Sequence[RunResult], system: str, load: float, path: str) -> Ratio | None:
    """Compare a system with the baseline at a load, seed by seed; None without the figure."""
    own = _by_seed(runs, system, load, path)
    base = _by_seed(runs, BASELINE, load, path)
    if not own:
        return None
    ratios = [own[seed] / base[seed] for seed in own if base.get(seed)]
    spread = _median_low_high(ratios) if ratios else (None, None, None)
    return Ratio(*_median_low_high(list(own.values())), *spread)


def summary(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """One row per load and system: each figure's median over seeds and ratio to the baseline."""
    rows = []
    for load, system in _points(runs):
        row: dict[str, Any] = {"load": load, "system": system}
        for _, path in COLUMNS + SLOWDOWN_COLUMNS:
            ratio = compare(runs, system, load, path)
            row[path] = asdict(ratio) if ratio else None
        rows.append(row)
    return rows


def markdown_table(runs: Sequence[RunResult], columns: Columns = COLUMNS) -> str:
    """A Markdown table; a cell is `median (ratio, lowest-highest ratio)`."""
    titles = ["load", "system", *(title for title, _ in columns)]
    lines = [_line(titles), _line(["---"] * len(titles))]
    for load, system in _points(runs):
        cells = [_cell(compare(runs, system, load, path), system) for _, path in columns]
        lines.append(_line([f"{load:g}", system, *cells]))
    return "\n".join(lines)


def output_check(runs: Sequence[RunResult]) -> dict[str, Any]:
    """Compare every request's output over all systems and loads of a seed."""
    expected: dict[tuple[int, str], str] = {}
    differing: set[tuple[int, str]] = set()
    for run in sorted(runs, key=lambda run: run.system != BASELINE):
        for request_id, digest in run.request_digests.items():
            key = (run.seed, request_id)
            if expected.setdefault(key, digest) != digest:
                differing.add(key)
    return {
        "runs": len(runs),
        "requests": len(expected),
        "identical": not differing,
        "differing": [f"seed {seed} request {name}" for seed, name in sorted(differing)],
    }


def sustained_rates(runs: Sequence[RunResult], target_ms: float) -> dict[str, dict[str, Any]]:
    """Rate at the normalized-latency target, as median over seeds and ratio to the baseline."""
    rates: dict[str, dict[int, float]] = {}
    for system in _unique(run.system for run in runs):
        for seed in _unique(run.seed for run in runs):
            rate = _sustained(runs, system, seed, target_ms)
            if rate is not None:
                rates.setdefault(system, {})[seed] = rate
    base = rates.get(BASELINE, {})
    return {
        system: {
            "rate_rps": statistics.median(by_seed.values()),
            "ratios": [by_seed[seed] / base[seed] for seed in by_seed if seed in base],
        }
        for system, by_seed in rates.items()
    }


def _sustained(runs: Sequence[RunResult], system: str, seed: int, target_ms: float) -> float | None:
    points = [run for run in runs if run.system == system and run.seed == seed]
    latencies = [run.figures["normalized_ms"]["mean"] for run in points]
    return sustained_rate([run.rate_rps for run in points], latencies, target_ms)


def _points(runs: Sequence[RunResult]) -> list[tuple[float, str]]:
    loads = sorted({run.load for run in runs})
    systems = _unique(run.system for run in runs)
    present = {(run.load, run.system) for run in runs}
    return [(load, system) for load in loads for system in systems if (load, system) in present]


def _by_seed(runs: Iterable[RunResult], system: str, load: float, path: str) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for run in runs:
        if run.system == system and run.load == load:
            value = value_of(run.figures, path)
            if value is not None:
                values.setdefault(run.seed, []).append(value)
    return {seed: statistics.median(of_seed) for seed, of_seed in values.items()}


def _median_low_high(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _cell(ratio: Ratio | None, system: str) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio.median:.4g}"
    if system == BASELINE or ratio.ratio_median is None:
        return text
    spread = f", {ratio.ratio_low:.3g}-{ratio.ratio_high:.3g}"
    shown = spread if ratio.ratio_low != ratio.ratio_high else ""
    return f"{text} ({ratio.ratio_median:.3g}x{shown})"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
