"""Benchmarks that are run by hand work, on inputs that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import chat_identity, frontier, observability_overhead, scheduler_overhead

ROOT = Path(__file__).resolve().parents[2]


def written(path):
    return json.loads(path.read_text())


def test_deeper_model(tmp_path):
    """The model of the benchmarks whose steps take longer."""
    folder = tmp_path / "model"
    command = [sys.executable, "scripts/tiny_model.py", str(folder), "--layers", "16"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert written(folder / "config.json")["num_hidden_layers"] == 16


def test_scheduler_overhead(tiny_model, tmp_path):
    """Both schedulers have a time a step, FastServe's under any configuration."""
    out = tmp_path / "out.json"
    flags = ["--sync-only", "--batch", "4", "--queued", "8", "--steps", "50", "--seeds", "0"]
    flags += ["--warm-turns", "2", "--model", str(tiny_model), "--output", str(out)]
    flags += ["--fastserve-config", '{"starvation_limit_s": "off"}']
    assert scheduler_overhead.main(flags) == 0
    assert written(out)


def test_observability_overhead(tiny_model, tmp_path):
    """What figures and traces cost has a time, too."""
    out = tmp_path / "out.json"
    flags = ["--batch", "4", "--queued", "8", "--steps", "50", "--seeds", "0"]
    flags += ["--blocks", "200", "--model", str(tiny_model), "--output", str(out)]
    assert observability_overhead.main(flags) == 0
    assert written(out)


def test_frontier(tmp_path):
    """Every arrangement is simulated, and drawn."""
    flags = ["--workload", "sharegpt", "--name", "ShareGPT", "--load", "1.2", "--seeds", "0"]
    assert frontier.main([*flags, "--requests", "40", "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}


def test_frontier_says_whom_the_simulator_misranks():
    """Not those between whom the engine sees no difference."""
    real = {"a": {"e2e mean": 1.0}, "b": {"e2e mean": 1.005}, "c": {"e2e mean": 1.2}}
    simulated = {"a": {"e2e mean": 1.1}, "b": {"e2e mean": 1.0}, "c": {"e2e mean": 1.05}}
    assert "+10.0%" in frontier.errors(simulated, real)
    assert frontier.misranked(simulated, real) == ["e2e mean: a and c"]


def test_chat_identity(tiny_model, tmp_path):
    """All 64 answers are compared, and some of their requests were preempted."""
    out = tmp_path / "out.json"
    flags = ["--model", str(tiny_model), "--max-tokens", "8", "--output", str(out)]
    assert chat_identity.main(flags) == 0
    assert written(out)
