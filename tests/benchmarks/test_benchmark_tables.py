from __future__ import annotations

import pytest

from benchmarks.alone import Alone
from benchmarks.result import RunResult, value_of
from benchmarks.tables import (
    compare,
    figure_table,
    headline,
    output_check,
    summary,
    sustained_rates,
    target_ms,
)


def run(system, seed=0, load=1.0, ttft=100.0, normalized=5.0, rate=10.0, digest="same"):
    figures = {"ttft_ms": {"mean": ttft}, "normalized_ms": {"mean": normalized}}
    return RunResult(system, load, seed, rate, figures, digest, {"0": digest})


def test_ratios_pair_seeds():
    """The ratio is taken seed by seed, then the median of the ratios."""
    runs = [run("vllm-fcfs", seed, ttft=base) for seed, base in enumerate((100.0, 200.0, 400.0))]
    runs += [run("fastserve", seed, ttft=own) for seed, own in enumerate((10.0, 100.0, 80.0))]
    ratio = compare(runs, "fastserve", 1.0, "ttft_ms.mean")
    assert (ratio.median, ratio.low, ratio.high) == (80.0, 10.0, 100.0)
    assert (ratio.ratio_median, ratio.ratio_low, ratio.ratio_high) == (0.2, 0.1, 0.5)


def test_missing_figures_stay_missing():
    """A figure that a run does not have is a dash, not a zero."""
    runs = [run("vllm-fcfs")]
    assert value_of(runs[0], "slowdown.1-10.mean") is None
    assert compare(runs, "vllm-fcfs", 1.0, "slowdown.1-10.mean") is None


def test_columns_without_any_figure_are_left_out():
    """What no point has gets no column; what one point lacks is a dash."""
    lacking = RunResult("mlfq", 1.0, 0, 10.0, {"normalized_ms": {"mean": 5.0}}, "same", {})
    table = figure_table([run("vllm-fcfs"), lacking]).markdown()
    assert "e2e" not in table
    assert "| 1 | mlfq | - | 5 (1x) |" in table


def test_table_has_a_row_for_each_load_and_system():
    """The baseline's row shows no ratio, every other one does."""
    runs = [run("vllm-fcfs"), run("fastserve", ttft=10.0), run("vllm-fcfs", load=1.2)]
    lines = figure_table(runs).markdown().splitlines()
    assert len(lines) == 2 + 3
    assert "| 1 | vllm-fcfs | 100 |" in lines[2]
    assert "| 1 | fastserve | 10 (0.1x) |" in lines[3]
    assert len(summary(runs)) == 3


def test_differing_output_is_found():
    """A request whose output differs in any run of its seed is named."""
    same = [run("vllm-fcfs"), run("fastserve"), run("fastserve", load=1.2)]
    assert output_check(same)["identical"]
    check = output_check([*same, run("mlfq", digest="other")])
    assert check["differing"] == ["seed 0 request 0"]


def test_seeds_have_outputs_of_their_own():
    """Outputs are not compared between seeds."""
    assert output_check([run("vllm-fcfs", 0), run("vllm-fcfs", 1, digest="other")])["identical"]


def test_headline_is_a_ratio_of_rates():
    """Each system's rate at the target, over the baseline's."""
    runs = [
        run("vllm-fcfs", load=1.0, rate=10.0, normalized=1.0),
        run("vllm-fcfs", load=2.0, rate=20.0, normalized=100.0),
        run("fastserve", load=2.0, rate=20.0, normalized=1.0),
        run("fastserve", load=4.0, rate=40.0, normalized=100.0),
    ]
    rates = sustained_rates(runs, 10.0)
    assert rates["fastserve"]["rate_rps"] == pytest.approx(30.0)
    assert rates["fastserve"]["ratios"] == pytest.approx([2.0])


def test_ratios_to_another_baseline():
    """Any system can be the denominator."""
    runs = [run("vllm-fcfs", ttft=100.0), run("mlfq", ttft=50.0), run("fastserve", ttft=10.0)]
    assert compare(runs, "fastserve", 1.0, "ttft_ms.mean", "mlfq").ratio_median == 0.2
    assert "| 1 | mlfq | 50 |" in figure_table(runs, baseline="mlfq").markdown()


def test_the_target_is_ten_decode_steps_of_the_baseline():
    """The median over the baseline's points; other systems do not count."""
    points = [
        RunResult(system, None, 0, None, {}, "", {}, alone=Alone(0.0, 0.0, token_s))
        for system, token_s in (("vllm-fcfs", 0.002), ("vllm-fcfs", 0.004), ("fastserve", 1.0))
    ]
    assert target_ms(points) == pytest.approx(30.0)


def test_headline_says_where_the_target_was_not_enclosed():
    """Nothing is extrapolated, and the table says so."""
    runs = [
        run("vllm-fcfs", load=1.0, rate=10.0, normalized=1.0),
        run("vllm-fcfs", load=2.0, rate=20.0, normalized=100.0),
        run("fastserve", load=2.0, rate=20.0, normalized=1.0),
    ]
    lines = headline(runs, 10.0).markdown().splitlines()
    assert lines[2] == "| vllm-fcfs | 15 | 1x (1-1, 1 seeds) |"
    assert lines[3] == "| fastserve | outside the loads measured | - |"


def test_all_at_once_has_rows_of_its_own():
    """A point without a load comes first."""
    runs = [run("vllm-fcfs"), run("vllm-fcfs", load=None)]
    assert "| all at once | vllm-fcfs |" in figure_table(runs).markdown().splitlines()[2]
