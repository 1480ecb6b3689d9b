"""Simulated sustained rates."""

import json

import pytest

from benchmarks import sustained

WORKLOAD = ["--workload", "alpaca", "--batch", "4", "--requests", "150", "--seeds", "0", "1"]


def test_each_system_beside_the_baseline(tmp_path, capsys):
    """FastServe keeps to the target at higher loads than first come, first served."""
    assert sustained.main([*WORKLOAD, "--systems", "fastserve", "--out", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "sustained.json").read_text())
    baseline, ours = document["systems"]
    assert (baseline["system"], ours["system"]) == ("vllm-fcfs", "fastserve")
    assert baseline["over_baseline"] == [1.0, 1.0]
    assert len(ours["over_baseline"]) == 2
    assert all(ratio > 1 for ratio in ours["over_baseline"])
    assert "fastserve" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["srpt-oracle", "nobody"])
def test_what_cannot_be_simulated(tmp_path, capsys, system):
    """It is named."""
    words = [*WORKLOAD, "--systems", system, "--out", str(tmp_path)]
    assert sustained.main(words) == 2
    assert system in capsys.readouterr().err
