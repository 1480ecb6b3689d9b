"""The simulator beside points of the real engine."""

import json

from benchmarks import validate


def test_predictions_beside_points(tmp_path, tiny_model, capsys):
    """On the virtual clock they hardly differ."""
    words = ["--workload", "sharegpt", "--requests", "12", "--batch", "4", "--loads", "1.0"]
    words += ["--systems", "vllm-fcfs", "fastserve", "--seeds", "0", "--model", str(tiny_model)]
    assert validate.main([*words, "--quiet", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "validation.json").read_text())["points"]
    assert {row["system"] for row in rows} == {"vllm-fcfs", "fastserve"}
    for row in rows:
        assert abs(row["e2e_ms.mean"]["error"]) < 0.05
    assert "fastserve" in capsys.readouterr().out


def test_on_the_walls_clock_steps_are_fitted_twice(tmp_path, tiny_model, capsys):
    """To every point itself, and to the first seed for the others."""
    words = ["--workload", "sharegpt", "--requests", "12", "--batch", "4", "--loads", "1.0"]
    words += ["--systems", "vllm-fcfs", "--seeds", "0", "1", "--model", str(tiny_model)]
    words += ["--clock", "wall", "--quiet", "--out", str(tmp_path)]
    assert validate.main(words) == 0
    rows = json.loads((tmp_path / "validation.json").read_text())["points"]
    point, first = "fitted to the point itself", "fitted to the first seed"
    assert [(row["fit"], row["seed"]) for row in rows] == [(point, 0), (point, 1), (first, 1)]
    assert f"Step times: {first}." in capsys.readouterr().out
