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
