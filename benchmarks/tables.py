"""From measured points to tables: medians over seeds, ratios to a baseline, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from benchmarks.metrics import BUCKETS, sustained_rate
from benchmarks.result import RunResult, value_of
from benchmarks.systems import BASELINE, SYSTEMS

Columns: TypeAlias = tuple[tuple[str, str], ...]

# Title and path of a figure.
LATENCY_COLUMNS: Columns = (
    ("TTFT mean ms", "ttft_ms.mean"),
    ("TTFT P95 ms", "ttft_ms.p95"),
    ("normalized mean ms", "normalized_ms.mean"),
    ("normalized P95 ms", "normalized_ms.p95"),
    ("e2e mean ms", "e2e_ms.mean"),
    ("e2e P95 ms", "e2e_ms.p95"),
    ("e2e P99 ms", "e2e_ms.p99"),
    ("longest gap P95 ms", "longest_gap_ms.p95"),
    ("longest gap P99 ms", "longest_gap_ms.p99"),
    ("output tokens/s", "output_tokens_per_s"),
)
SLOWDOWN_COLUMNS: Columns = tuple(
    (f"slowdown at {name} tokens", f"slowdown.{name}.mean") for name, _, _ in BUCKETS
)
COST_COLUMNS: Columns = (
    ("paused", "preemptions.paused"),
    ("recomputed", "preemptions.recomputed"),
    ("by vLLM", "preemptions.by_vllm"),
    ("tokens recomputed", "tokens_recomputed"),
    ("out ahead", "swaps.outs_ahead"),
    ("out urgent", "swaps.outs_urgent"),
    ("in ahead", "swaps.ins_ahead"),
    ("in urgent", "swaps.ins_urgent"),
    ("MiB out", "swaps.mib_out"),
    ("MiB in", "swaps.mib_in"),
    ("copied of first outs", "swaps.first_out_copied"),
    ("of later outs", "swaps.again_out_copied"),
    ("copy wait / step time", "swaps.copy_wait_share"),
    ("scheduler ms/step", "wall.scheduler_step_ms"),
    ("step mean ms", "step_ms.mean"),
    ("CPU ms/step", "wall.cpu_step_ms"),
    ("waited for a core", "wall.run_delay_share"),
    ("machine short of cores", "wall.cpu_pressure_share"),
    ("a fixed loop us", "wall.loop_us"),
    ("pace held up", "wall.pace_held_up_share"),
    ("client late max ms", "wall.client_late_max_ms"),
)
TABLES: tuple[Columns, ...] = (LATENCY_COLUMNS, SLOWDOWN_COLUMNS, COST_COLUMNS)
# The latency target, in decode steps of an idle engine: 0.3 s a token on the paper's hardware.
TARGET_STEPS = 10


@dataclass(frozen=True)
class Ratio:
    """A figure over seeds, and its ratio to the baseline at the same load and seed."""

    median: float
    low: float
    high: float
    ratio_median: float | None
    ratio_low: float | None
    ratio_high: float | None


@dataclass(frozen=True)
class Table:
    """Titles and rows of text."""

    titles: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """As Markdown."""
        return "\n".join(map(_line, [self.titles, ["---"] * len(self.titles), *self.rows]))


def compare(
    runs: Sequence[RunResult], system: str, load: float | None, path: str, baseline: str = BASELINE
) -> Ratio | None:
    """Compare a system with the baseline at a load, seed by seed; None without the figure."""
    own = _by_seed(runs, system, load, path)
    base = _by_seed(runs, baseline, load, path)
    if not own:
        return None
    ratios = [own[seed] / base[seed] for seed in own if base.get(seed)]
    spread = _median_low_high(ratios) if ratios else (None, None, None)
    return Ratio(*_median_low_high(list(own.values())), *spread)


def summary(runs: Sequence[RunResult], baseline: str = BASELINE) -> list[dict[str, Any]]:
    """One row per load and system: each figure's median over seeds and ratio to the baseline."""
    rows = []
    for load, system in _points(runs):
        row: dict[str, Any] = {"load": load, "system": system}
        for _, path in (column for columns in TABLES for column in columns):
            ratio = compare(runs, system, load, path, baseline)
            row[path] = asdict(ratio) if ratio else None
        rows.append(row)
    return rows


def figure_table(
    runs: Sequence[RunResult], columns: Columns = LATENCY_COLUMNS, baseline: str = BASELINE
) -> Table | None:
    """A row for each load and system; a cell is `median (ratio, lowest-highest ratio)`.

    Figures that no point has get no column; without any column there is no table.
    """
    columns = tuple(c for c in columns if any(value_of(run, c[1]) is not None for run in runs))
    if not columns:
        return None
    rows = []
    for load, system in _points(runs):
        ratios = [compare(runs, system, load, path, baseline) for _, path in columns]
        cells = [cell(ratio, is_baseline=system == baseline) for ratio in ratios]
        rows.append(["all at once" if load is None else f"{load:g}", system, *cells])
    return Table(["load", "system", *(title for title, _ in columns)], rows)


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


def target_ms(runs: Sequence[RunResult]) -> float | None:
    """The normalized latency that counts as sustained: ten of the baseline's decode steps."""
    steps_s = [run.alone.token_s for run in runs if run.system == BASELINE and run.alone]
    return 1000 * TARGET_STEPS * statistics.median(steps_s) if steps_s else None


def sustained_rates(
    runs: Sequence[RunResult], target: float, baseline: str = BASELINE
) -> dict[str, dict[str, Any]]:
    """Rate at the normalized-latency target, as median over seeds and ratios to the baseline.

    A system whose points do not enclose the target is left out.
    """
    rates: dict[str, dict[int, float]] = {}
    for system in systems_of(runs):
        for seed in sorted({run.seed for run in runs}):
            rate = _sustained(runs, system, seed, target)
            if rate is not None:
                rates.setdefault(system, {})[seed] = rate
    base = rates.get(baseline, {})
    return {
        system: {
            "rate_rps": statistics.median(by_seed.values()),
            "ratios": [by_seed[seed] / base[seed] for seed in by_seed if seed in base],
        }
        for system, by_seed in rates.items()
    }


def headline(runs: Sequence[RunResult], target: float, baseline: str = BASELINE) -> Table:
    """The sustained rates."""
    rates = sustained_rates(runs, target, baseline)
    title = f"requests/s at a normalized latency of {target:.4g} ms"
    rows = []
    for system in systems_of(run for run in runs if run.load is not None):
        if system not in rates:
            rows.append([system, "outside the loads measured", "-"])
            continue
        ratios = rates[system]["ratios"]
        cell = "-"
        if ratios:
            middle, low, high = _median_low_high(ratios)
            cell = f"{middle:.3g}x ({low:.3g}-{high:.3g}, {len(ratios)} seeds)"
        rows.append([system, f"{rates[system]['rate_rps']:.4g}", cell])
    return Table(["system", title, f"over {baseline}"], rows)


def tables_of(
    runs: Sequence[RunResult], baseline: str = BASELINE, target: float | None = None
) -> list[Table]:
    """Every table of a set of points."""
    found = [figure_table(runs, columns, baseline) for columns in TABLES]
    target = target or target_ms(runs)
    if target is not None and any(run.load is not None for run in runs):
        found.append(headline(runs, target, baseline))
    return [table for table in found if table is not None]


def output_verdict(runs: Sequence[RunResult]) -> str:
    """Whether all systems generated the same, in a line."""
    check = output_check(runs)
    verdict = "identical" if check["identical"] else f"DIFFERENT: {check['differing'][:10]}"
    return f"outputs of {check['requests']} requests in {check['runs']} runs: {verdict}"


def printed(runs: Sequence[RunResult], baseline: str = BASELINE) -> str:
    """Every table as Markdown, and whether all systems generated the same."""
    tables = [table.markdown() for table in tables_of(runs, baseline)]
    return "\n\n".join([*tables, output_verdict(runs)])


def _sustained(runs: Sequence[RunResult], system: str, seed: int, target: float) -> float | None:
    rates, latencies = [], []
    for run in runs:
        if run.system == system and run.seed == seed and run.rate_rps is not None:
            rates.append(run.rate_rps)
            latencies.append(run.figures["normalized_ms"]["mean"])
    return sustained_rate(rates, latencies, target)


def loads_of(runs: Iterable[RunResult]) -> list[float | None]:
    """Every load, the smallest first; all at once, which has none, before them."""
    return sorted({run.load for run in runs}, key=lambda load: (load is not None, load))


def _points(runs: Sequence[RunResult]) -> list[tuple[float | None, str]]:
    loads = loads_of(runs)
    systems = systems_of(runs)
    present = {(run.load, run.system) for run in runs}
    return [(load, system) for load in loads for system in systems if (load, system) in present]


def _by_seed(
    runs: Iterable[RunResult], system: str, load: float | None, path: str
) -> dict[int, float]:
    values: dict[int, float] = {}
    for run in runs:
        if run.system == system and run.load == load:
            value = value_of(run, path)
            if value is not None:
                values[run.seed] = value
    return values


def _median_low_high(values: Sequence[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def cell(ratio: Ratio | None, *, is_baseline: bool) -> str:
    """A figure as text: `median (ratio, lowest-highest ratio)`."""
    if ratio is None:
        return "-"
    text = f"{ratio.median:.4g}"
    if is_baseline or ratio.ratio_median is None:
        return text
    spread = f", {ratio.ratio_low:.3g}-{ratio.ratio_high:.3g}"
    shown = spread if ratio.ratio_low != ratio.ratio_high else ""
    return f"{text} ({ratio.ratio_median:.3g}x{shown})"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def systems_of(runs: Iterable[RunResult]) -> list[str]:
    """In the order of the table of systems, whatever the order of the points."""
    present = {run.system for run in runs}
    return [name for name in SYSTEMS if name in present]
