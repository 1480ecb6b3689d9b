"""Simulated loss of speed."""

import json

import pytest

from benchmarks import slower_steps

WORKLOAD = ["--workload", "sharegpt", "--batch", "4", "--requests", "80", "--loads", "1.2"]


def test_a_loss_of_speed_is_a_larger_one_of_latency(tmp_path, capsys):
    """Longer steps: fewer tokens a second, and a longer wait by more than that."""
    assert slower_steps.main([*WORKLOAD, "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "slower_steps.json").read_text())["systems"]
    assert [row["slower_percent"] for row in rows] == list(slower_steps.PERCENT)
    assert {row["system"] for row in rows} == {"fastserve"}
    for seed in range(2):
        first, *others = (row["over_baseline"][seed] for row in rows)
        for row, ours in zip(rows[1:], others, strict=True):
            slower = 1 + row["slower_percent"] / 100
            assert ours["output tokens/s"] < first["output tokens/s"]
            assert ours["e2e mean"] > slower * first["e2e mean"]
    assert "steps longer by" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["srpt-oracle", "nobody"])
def test_what_cannot_be_simulated(tmp_path, capsys, system):
    """It is named."""
    assert slower_steps.main([*WORKLOAD, "--systems", system, "--out", str(tmp_path)]) == 2
    assert system in capsys.readouterr().err


def test_all_at_once_has_no_load(tmp_path, capsys):
    """It is refused."""
    words = [*WORKLOAD[:-2], "--all-at-once", "--out", str(tmp_path)]
    assert slower_steps.main(words) == 2
    assert "--loads" in capsys.readouterr().err
