"""Simulated loss of speed."""

import json
from itertools import product

import pytest

from benchmarks import slower_steps

WORKLOAD = ["--workload", "sharegpt", "--batch", "4", "--requests", "80", "--loads", "1.2"]


def test_a_loss_of_speed_is_a_larger_one_of_latency(tmp_path, capsys):
    """Longer steps: fewer tokens a second, and a longer wait by more than that."""
    assert slower_steps.main([*WORKLOAD, "--seeds", "0", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "slower_steps.json").read_text())["systems"]
    assert {row["system"] for row in rows} == {"fastserve"}
    steps_ms = {row["full_step_ms"] for row in rows}
    # 1.4 ms, and 30 us for each of four decodes.
    assert sorted(steps_ms) == [1.52, 6.08, 15.2]
    for step_ms, seed in product(steps_ms, range(2)):
        engine = [row for row in rows if row["full_step_ms"] == step_ms]
        assert [row["slower_percent"] for row in engine] == list(slower_steps.PERCENT)
        first, *others = (row["over_baseline"][seed] for row in engine)
        for row, ours in zip(engine[1:], others, strict=True):
            slower = 1 + row["slower_percent"] / 100
            assert ours["output tokens/s"] < first["output tokens/s"]
            assert ours["e2e mean"] > slower * first["e2e mean"]
    assert "steps longer by" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["srpt-oracle", "nobody"])
def test_what_cannot_be_simulated(tmp_path, capsys, system):
    """It is named."""
    assert slower_steps.main([*WORKLOAD, "--systems", system, "--out", str(tmp_path)]) == 2
    assert system in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--clock", "wall"], ["--http"]])
def test_no_other_clock_than_the_virtual_one(tmp_path, capsys, words):
    """Nothing here takes real time, so it is refused."""
    assert slower_steps.main([*WORKLOAD, *words, "--out", str(tmp_path)]) == 2
    assert words[0] in capsys.readouterr().err


def test_all_at_once_has_no_load(tmp_path, capsys):
    """It is refused."""
    words = [*WORKLOAD[:-2], "--all-at-once", "--out", str(tmp_path)]
    assert slower_steps.main(words) == 2
    assert "--loads" in capsys.readouterr().err
