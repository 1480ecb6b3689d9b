"""Built-in workloads and how they are fitted."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from benchmarks import fit_workload
from benchmarks.fit_workload import drawn, fitted, ks_distance, rank_correlation
from benchmarks.workload import built_in
from fastserve_vllm.workloads import KNOT_SHARES, WORKLOADS, Workload, is_served

FLAT = (10.0,) * len(KNOT_SHARES)
RISING = tuple(10.0 * 1.5**n for n in range(len(KNOT_SHARES)))


def first(workload, seed, count=50):
    return list(islice(workload.lengths(seed), count))


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_follow_the_seed(name):
    """The same seed gives the same requests, another one others; all pass the filter."""
    workload = WORKLOADS[name]
    assert first(workload, 3) == first(workload, 3)
    assert first(workload, 3) != first(workload, 4)
    assert all(is_served(*lengths) for lengths in first(workload, 3, 20_000))


@pytest.mark.parametrize(
    ("name", "prompt_mean", "output_mean", "correlation"),
    [("sharegpt", 108.6, 320.4, 0.184), ("alpaca", 18.54, 58.92, -0.237)],
)
def test_means_and_correlation_are_the_traces(name, prompt_mean, output_mean, correlation):
    """Within 3 %: the trace's figures are those that `fit_workload` printed."""
    lengths = np.array(first(WORKLOADS[name], 1, 50_000))
    assert lengths[:, 0].mean() == pytest.approx(prompt_mean, rel=0.03)
    assert lengths[:, 1].mean() == pytest.approx(output_mean, rel=0.03)
    assert rank_correlation(lengths) == pytest.approx(correlation, abs=0.02)


def test_lengths_need_the_standard_library_only():
    """A simulation imports neither numpy nor vLLM nor torch for them."""
    program = (
        "import sys; from fastserve_vllm.workloads import WORKLOADS; "
        "next(WORKLOADS['sharegpt'].lengths(0)); "
        "sys.exit(bool({'numpy', 'vllm', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_fit_finds_what_it_was_drawn_from():
    """Knots within a few percent, the correlation, and a small distance."""
    workload = Workload(RISING, tuple(reversed([400.0 / 1.3**n for n in range(13)])), 0.5)
    lengths = drawn(workload, seed=5)
    found = fitted(lengths)
    assert found.output_knots[3:10] == pytest.approx(workload.output_knots[3:10], rel=0.05)
    assert found.correlation == pytest.approx(0.5, abs=0.02)
    again = drawn(found, seed=6)
    assert ks_distance(lengths[:, 1], again[:, 1]) < 0.02


def test_distance_of_samples():
    """None of equal ones; all of samples apart."""
    low, high = np.array([1, 2, 3]), np.array([7, 8])
    assert ks_distance(low, low) == 0
    assert ks_distance(low, high) == 1
    assert ks_distance(np.array([1, 2]), np.array([2, 3])) == 0.5


@pytest.mark.parametrize(
    ("prompts", "outputs", "correlation", "message"),
    [
        (FLAT[1:], FLAT, 0.0, "knots above 0 are needed"),
        (FLAT, (0.0, *FLAT[1:]), 0.0, "knots above 0 are needed"),
        (FLAT, RISING[::-1], 0.0, "must not decrease"),
        (FLAT, FLAT, 1.0, "between -1 and 1"),
    ],
)
def test_senseless_parameters_are_refused(prompts, outputs, correlation, message):
    """When they are made, saying what is wrong."""
    with pytest.raises(ValueError, match=message):
        Workload(prompts, outputs, correlation)


def test_built_in_rows_carry_no_arrivals():
    """They are a trace of lengths alone, the same one each time."""
    rows = built_in("alpaca")
    assert rows == built_in("alpaca")
    assert {row.arrival_s for row in rows} == {None}


def test_the_command_prints_parameters_and_errors(tmp_path, capsys):
    """And refuses a trace that is none, with status 2."""
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{20 + n % 40},{10 + n % 90}\n" for n in range(300))
    trace.write_text(f"prompt_tokens,output_tokens\n{rows}", encoding="utf-8")
    assert fit_workload.main(["--trace", str(trace), "--json", str(tmp_path / "fit.json")]) == 0
    printed = capsys.readouterr().out
    assert "prompt_knots=(" in printed
    assert "| output KS distance" in printed
    assert (tmp_path / "fit.json").is_file()
    assert fit_workload.main(["--trace", str(tmp_path / "none.csv")]) == 2
