"""Plots of measured points. Each function draws one figure; None where there is nothing to draw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.metrics import BUCKETS, QUANTILES
from benchmarks.result import RunResult, value_of
from benchmarks.systems import SYSTEMS
from benchmarks.tables import loads_of, systems_of

mpl.use("Agg")

LATENCIES = (
    ("mean TTFT", "ttft_ms.mean"),
    ("P95 TTFT", "ttft_ms.p95"),
    ("mean normalized latency", "normalized_ms.mean"),
    ("mean end-to-end latency", "e2e_ms.mean"),
    ("P99 end-to-end latency", "e2e_ms.p99"),
    ("P95 longest token gap", "longest_gap_ms.p95"),
)
DISTRIBUTIONS = (("TTFT", "ttft_ms"), ("longest token gap", "longest_gap_ms"))
Plot = Callable[[Sequence[RunResult]], Figure | None]


def colour(system: str) -> Any:
    """The same one in every plot."""
    return mpl.colormaps["tab10"](list(SYSTEMS).index(system))


def latency_over_rate(runs: Sequence[RunResult]) -> Figure | None:
    """Medians over seeds, with the range as a band."""
    loads = [load for load in loads_of(runs) if load is not None]
    if not loads:
        return None
    figure, grid = _grid(2, 3)
    for axes, (title, path) in zip(grid.flat, LATENCIES, strict=True):
        for system in systems_of(runs):
            found = [(load, values_of(runs, system, load, path)) for load in loads]
            drawn = [(load, values) for load, values in found if values]
            if not drawn:
                continue
            x = [load for load, _ in drawn]
            middle = [statistics.median(values) for _, values in drawn]
            axes.plot(x, middle, marker="o", **line_of(system, systems_of(runs)))
            low, high = ([f(values) for _, values in drawn] for f in (min, max))
            axes.fill_between(x, low, high, color=colour(system), alpha=0.15, lw=0)
        axes.set(title=title, yscale="log", xlabel="arrival rate / capacity", ylabel="ms")
        plain_numbers(axes.yaxis)
    return _finished(figure, grid)


def distributions(runs: Sequence[RunResult]) -> Figure | None:
    """The share of the requests that waited no longer, at each load; seeds averaged."""
    runs = [run for run in runs if run.figures.get("quantiles") and run.load is not None]
    loads = loads_of(runs)
    if not loads:
        return None
    figure, grid = _grid(len(DISTRIBUTIONS), len(loads), width=3.2)
    for row, (title, name) in zip(grid, DISTRIBUTIONS, strict=True):
        for axes, load in zip(row, loads, strict=True):
            for system in systems_of(runs):
                curves = [
                    run.figures["quantiles"][name]
                    for run in runs
                    if (run.system, run.load) == (system, load) and name in run.figures["quantiles"]
                ]
                if curves:
                    x = np.mean(curves, axis=0)
                    axes.plot(x, QUANTILES, **line_of(system, systems_of(runs)))
            axes.set(title=f"{title}, load {load:g}", xscale="log", xlabel="ms")
            plain_numbers(axes.xaxis, (1, 3))
            axes.tick_params(axis="x", labelsize=7)
        row[0].set_ylabel("% of requests")
    return _finished(figure, grid)


def slowdowns(runs: Sequence[RunResult]) -> Figure | None:
    """Mean latency over that on an idle engine, by output length."""
    return _bars(
        runs,
        [name for name, _, _ in BUCKETS],
        lambda system, load, bucket: values_of(runs, system, load, f"slowdown.{bucket}.mean"),
        title="slowdown",
        xlabel="output tokens",
        log=True,
    )


def throughput(runs: Sequence[RunResult]) -> Figure | None:
    """Output tokens a second, medians over seeds."""
    return _bars(
        runs,
        [""],
        lambda system, load, _: values_of(runs, system, load, "output_tokens_per_s"),
        title="output tokens/s",
        xlabel="",
        log=False,
    )


def swap_timeline(runs: Sequence[RunResult]) -> Figure | None:
    """Blocks held on either side, and blocks copied so far: one seed at the highest load."""
    runs = [run for run in runs if run.timeline and run.load is not None]
    swapping = {run.system for run in runs if max(run.timeline["blocks_out"]) > 0}
    if not swapping:
        return None
    load, seed = loads_of(runs)[-1], min(run.seed for run in runs)
    shown = [run for run in runs if (run.load, run.seed) == (load, seed)]
    shown.sort(key=lambda run: list(SYSTEMS).index(run.system))
    figure, grid = _grid(2, len(shown), width=3.6, sharex=True, sharey=True)
    for (held, copies), run in zip(grid.T, shown, strict=True):
        _draw_timeline(held, copies, run)
    grid[0][0].set_ylabel("blocks held")
    grid[1][0].set_ylabel("blocks copied so far")
    grid[0][-1].legend(fontsize=8)
    grid[1][-1].legend(fontsize=8)
    return figure


PLOTS: dict[str, tuple[str, Plot]] = {
    "latency": ("Latency against arrival rate", latency_over_rate),
    "distributions": ("How long requests wait: the share that waits no longer", distributions),
    "slowdown": ("Slowdown against an idle engine, by output length", slowdowns),
    "throughput": ("Throughput", throughput),
    "swap": ("KV cache on the device and on the host over time", swap_timeline),
}


def _draw_timeline(held: Axes, copies: Axes, run: RunResult) -> None:
    line = run.timeline
    held.plot(line["time_s"], line["device_blocks"], label="device", lw=1)
    held.plot(line["time_s"], line["host_blocks"], label="host", lw=1)
    held.set_title(f"{run.system}, load {run.load:g}", fontsize=10)
    for name, label in (("blocks_out", "out"), ("blocks_in", "in")):
        copies.plot(line["time_s"], line[name], label=label, lw=1)
    copies.set_xlabel("s")


def _bars(
    runs: Sequence[RunResult],
    groups: Sequence[str],
    values: Callable[[str, float | None, str], list[float]],
    *,
    title: str,
    xlabel: str,
    log: bool,
) -> Figure | None:
    """Bars of every system for each group, one panel a load."""
    # All at once, there is only the baseline, unless nothing else was measured.
    loads = [load for load in loads_of(runs) if load is not None] or loads_of(runs)
    systems = systems_of(runs)
    found = {(s, n, g): values(s, n, g) for s in systems for n in loads for g in groups}
    if not any(found.values()):
        return None
    figure, grid = _grid(1, len(loads), width=3.2, sharey=True)
    width = 0.8 / len(systems)
    for axes, load in zip(grid[0], loads, strict=True):
        for number, system in enumerate(systems):
            heights = [statistics.median(found[system, load, g] or [0.0]) for g in groups]
            places = np.arange(len(groups)) + (number - (len(systems) - 1) / 2) * width
            axes.bar(places, heights, width, color=colour(system), label=system)
        axes.set_xticks(range(len(groups)), groups)
        at = "all at once" if load is None else f"load {load:g}"
        axes.set(title=f"{title}, {at}", xlabel=xlabel)
        if log:
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)
    if log:
        grid[0][0].set_ylim(bottom=1)
    return _finished(figure, grid)


def values_of(runs: Sequence[RunResult], system: str, load: float | None, path: str) -> list[float]:
    """A figure of a system at a load, from every seed that has it."""
    found = [value_of(run, path) for run in runs if (run.system, run.load) == (system, load)]
    return [value for value in found if value is not None]


def line_of(system: str, systems: Sequence[str]) -> dict[str, Any]:
    """How a line is drawn: the first ones wider, so that none hides another."""
    drawn_after = len(systems) - 1 - systems.index(system)
    return {"color": colour(system), "label": system, "lw": 1.3 + 0.6 * drawn_after, "ms": 4}


def plain_numbers(axis: Axis, digits: tuple[int, ...] = (1, 2, 5)) -> None:
    """Label a logarithmic axis with numbers instead of powers."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grid(
    rows: int, columns: int, *, width: float = 4.0, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, Any]:
    """Panels; `sharey` is within a row."""
    figure = Figure(figsize=(max(width * columns, 8.0), 3.0 * rows), layout="constrained")
    grid = figure.subplots(
        rows, columns, squeeze=False, sharex=sharex, sharey="row" if sharey else False
    )
    for axes in grid.flat:
        axes.grid(alpha=0.25)
        axes.title.set_fontsize(10)
    return figure, grid


def _finished(figure: Figure, grid: Any) -> Figure:
    """One legend for all panels, below them."""
    entries = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in SYSTEMS if name in entries]
    figure.legend(
        [entries[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False
    )
    return figure
