"""The paper's figures: the search for a rate, and what is shown of it."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import run
from benchmarks.alone import VIRTUAL
from benchmarks.cli import parse_arguments
from benchmarks.figures import __main__ as figures
from benchmarks.figures.catalogue import FIGURES, OURS
from benchmarks.figures.measure import excess
from benchmarks.figures.search import CLOSE, COMMON_LOADS, crossing, search
from benchmarks.result import RunResult
from benchmarks.systems import BASELINE, SYSTEMS


@pytest.mark.parametrize("limit", [0.45, 0.83, 1.0, 1.1, 1.37, 2.0, 3.3])
def test_the_search_finds_the_crossing(limit):
    """With few measurements, the common loads first, and its neighbours close."""
    tried = []

    def exponential(load):
        tried.append(load)
        return math.exp(5 * (load - limit))

    assert search(exponential) == pytest.approx(limit, rel=0.01)
    assert tuple(tried[:2]) == COMMON_LOADS
    assert len(tried) <= 9
    below = max(load for load in tried if load <= limit)
    above = min(load for load in tried if load > limit)
    assert above / below <= CLOSE


def test_a_crossing_out_of_reach_is_none():
    """Nothing is extrapolated."""
    assert search(lambda load: 0.5) is None
    assert search(lambda load: 2.0) is None
    assert crossing({1.0: 0.5, 1.2: 0.9}) is None


def test_the_first_crossing_counts():
    """A later dip below the limit is noise of a finite run."""
    assert 1.0 < crossing({1.0: 0.5, 1.2: 2.0, 1.5: 0.9, 1.8: 3.0}) < 1.2


def test_excess_is_relative_to_the_limit():
    """Ten steps of 2 ms for a latency; five percent of misses for a share."""
    goals = {setting.goal.path: setting.goal for f in FIGURES.values() for setting in f.settings}
    point = RunResult(
        OURS,
        1.0,
        0,
        1.0,
        {"normalized_ms": {"mean": 30.0, "p95": 5.0}, "within_target": {"middle": 0.9}},
        "",
        {},
    )
    assert excess(goals["normalized_ms.p95"], point, 0.002) == pytest.approx(0.25)
    assert excess(goals["within_target.middle"], point, 0.002) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"has no within_target\.tight"):
        excess(goals["within_target.tight"], point, 0.002)


def test_every_setting_is_a_command_line_of_the_benchmark(tmp_path):
    """With the baseline and FastServe among its systems, all of them known."""
    for figure in FIGURES.values():
        for setting in figure.settings:
            parse_arguments([*setting.options, "--out", str(tmp_path)])
            assert {BASELINE, OURS} <= set(setting.systems) <= set(SYSTEMS)
            assert set(setting.paper) <= set(setting.systems)


def test_settings_that_share_a_folder_share_their_points():
    """One folder holds one configuration."""
    options = {}
    for figure in FIGURES.values():
        for setting in figure.settings:
            shared = options.setdefault(setting.name, (setting.options, figure.requests))
            assert shared == (setting.options, figure.requests)


@pytest.fixture
def measured(monkeypatch):
    """Stands in for measuring: latencies grow with the load, FastServe's later."""

    def each(task, arguments, jobs, preloaded):
        for plan in arguments:
            late = 1.5 if plan.system.name == OURS else 1.0
            normalized = 15 * math.exp(3 * ((plan.load or 1.0) / late - 1))
            spread = {"mean": normalized, "p95": 2 * normalized}
            yield RunResult(
                plan.system.name,
                plan.load,
                plan.seed,
                plan.rate_rps,
                {
                    "requests_per_s": 10.0,
                    "normalized_ms": spread,
                    "ttft_ms": spread,
                    "longest_gap_ms": spread,
                    "e2e_ms": spread,
                },
                "digest",
                {"000000": "01234567"},
                alone=VIRTUAL,
            )

    monkeypatch.setattr(run, "each_in_fresh_process", each)


def test_a_figure_is_a_table_a_plot_and_json(tmp_path, measured, capsys, monkeypatch, tiny_model):
    """With the paper's ratio beside ours and the critics' figures in the same row."""
    monkeypatch.setattr("benchmarks.cli.model_folder", lambda path: path or _path(tiny_model))
    command = ["11", "--out", str(tmp_path), "--seeds", "0", "1", "--requests", "20"]
    assert figures.main(command) == 0
    printed = capsys.readouterr().out
    (row,) = [
        line for line in printed.splitlines() if "| sharegpt-b16 |" in line and BASELINE in line
    ]
    assert "| 1.5x (1.5-1.5, 2 seeds) | 2.03 / 2.24 / 2.43 |" in row
    for title in ("TTFT P95", "longest gap P95", "e2e mean"):
        assert f"{title} ms at load 1.2" in printed
    assert (tmp_path / "figure11.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "figure11.json").read_text(encoding="utf-8"))
    assert document["rows"][0]["fastserve_over_it"] == pytest.approx([1.5, 1.5], rel=0.01)


def _path(text):
    from pathlib import Path

    return Path(text)


def test_unknown_figures_are_refused(tmp_path, capsys):
    """Naming those that there are."""
    with pytest.raises(SystemExit):
        figures.main(["15", "--out", str(tmp_path)])
    assert "choose from 11, 12, 13, 14, 16, 17" in capsys.readouterr().err
