"""A measured figure as a table and a plot, the critics' figures beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.figures.catalogue import OURS
from benchmarks.figures.measure import Measured
from benchmarks.figures.search import COMMON_LOADS, LIMITS
from benchmarks.plots import line_of, plain_numbers, values_of
from benchmarks.systems import BASELINE
from benchmarks.tables import Table, cell, compare, loads_of

# What the paper leaves out and its critics asked for.
CRITICS = (
    ("TTFT P95 ms", "ttft_ms.p95"),
    ("longest gap P95 ms", "longest_gap_ms.p95"),
    ("e2e mean ms", "e2e_ms.mean"),
)


def table(settings: Sequence[Measured]) -> Table:
    """A row for each setting and system.

    `fastserve over it`: how many times the system's rate FastServe sustains, the median over
    seeds and the range. Behind it, at common loads, each figure and its ratio to stock vLLM.
    """
    critics = [f"{title} at load {load:g}" for load in COMMON_LOADS for title, _ in CRITICS]
    titles = ["setting", "goal", "system", "requests/s", "fastserve over it", "paper", *critics]
    rows = [
        [
            measured.setting.name,
            measured.setting.goal.title,
            system,
            _rate(measured, system),
            "" if system == OURS else _advantage(measured, system),
            measured.setting.paper.get(system, ""),
            *_critics(measured, system),
        ]
        for measured in settings
        for system in measured.setting.systems
    ]
    return Table(titles, rows)


def ratios(measured: Measured, system: str) -> list[float]:
    """FastServe's sustained rate over the system's, seed by seed, where both are known."""
    pairs = [
        (measured.rates[OURS, seed], rate)
        for (name, seed), rate in measured.rates.items()
        if name == system
    ]
    return [ours / rate for ours, rate in pairs if ours and rate]


def plot(settings: Sequence[Measured]) -> Figure:
    """The goal's figure against the rate in multiples of capacity, and its limit."""
    figure = Figure(figsize=(4.2 * len(settings), 3.4), layout="constrained")
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, measured in zip(panels, settings, strict=True):
        goal, is_share = measured.setting.goal, measured.setting.goal.steps is None
        for system in measured.setting.systems:
            found = [
                (load, values_of(measured.runs, system, load, goal.path))
                for load in loads_of(measured.runs)
                if load is not None
            ]
            x = [load for load, values in found if values]
            y = [statistics.median(values) for _, values in found if values]
            axes.plot(x, y, marker="o", **line_of(system, measured.setting.systems))
        limit = 0.95 if goal.steps is None else 1000 * goal.steps * measured.token_s
        axes.axhline(limit, color="grey", ls="--", lw=1)
        axes.set_title(f"{measured.setting.name}\n{goal.title}", fontsize=9)
        axes.set(
            xlabel="arrival rate / capacity",
            ylabel="share" if is_share else "ms",
            yscale="linear" if is_share else "log",
        )
        if not is_share:
            plain_numbers(axes.yaxis)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def _rate(measured: Measured, system: str) -> str:
    rates = [rate for (name, _), rate in measured.rates.items() if name == system and rate]
    if not rates:
        return f"not within {LIMITS[0]:g} to {LIMITS[1]:g} times capacity"
    return f"{statistics.median(rates):.4g}"


def _advantage(measured: Measured, system: str) -> str:
    found = ratios(measured, system)
    if not found:
        return "-"
    seeds = f"{min(found):.3g}-{max(found):.3g}, {len(found)} seeds"
    return f"{statistics.median(found):.3g}x ({seeds})"


def _critics(measured: Measured, system: str) -> list[str]:
    return [
        cell(compare(measured.runs, system, load, path), is_baseline=system == BASELINE)
        for load in COMMON_LOADS
        for _, path in CRITICS
    ]
