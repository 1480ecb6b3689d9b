"""The examples run, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import engine_flags

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def example(subprocess_env):
    """Runs an example and returns what it printed."""

    def run(name, *flags, **env):
        done = subprocess.run(
            [sys.executable, EXAMPLES / name, *flags],
            env=subprocess_env | env,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


# Saves the time that an engine process takes to start.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_offline_batch(example, tiny_model):
    """One line a request, with its tokens and its times."""
    printed = example("offline_batch.py", "--model", tiny_model, *engine_flags(), **IN_PROCESS)
    tokens = [int(n) for n in re.findall(r"^ +(\d+) +\d+\.\d+ s +\d+\.\d+ s$", printed, re.M)]
    assert tokens == [160, 16, 16] * 4


def test_priorities(example, tiny_model):
    """Urgent requests end first, background ones last."""
    printed = example("priorities.py", "--model", tiny_model, *engine_flags(), **IN_PROCESS)
    order = re.findall(r"^(\w+) +done after", printed, re.M)
    assert order[:3] == ["urgent"] * 3
    assert order[-2:] == ["background"] * 2


def test_custom_policy(example, tiny_model):
    """Short prompts that came last end first."""
    printed = example("custom_policy.py", "--model", tiny_model, *engine_flags(), **IN_PROCESS)
    order = re.findall(r"^(long|short) 32 tokens$", printed, re.M)
    assert order == ["short"] * 4 + ["long"] * 4


def test_custom_policy_is_short():
    """A policy, and the program that shows it, in under 40 lines."""
    assert len((EXAMPLES / "custom_policy.py").read_text().splitlines()) < 40


def test_quantum_sweep(example):
    """A row for each quantum; the shortest pauses answers more often than the longest."""
    printed = example("quantum_sweep.py", "--requests", "300", "--batch", "8")
    rows = [line.split() for line in printed.splitlines()[1:]]
    assert [float(row[0]) for row in rows] == [0.25, 1, 4, 16, 64, 256]
    assert int(rows[0][-1]) > int(rows[-1][-1]) >= 0


def test_async_engine(example, tiny_model):
    """All streams arrive whole."""
    printed = example("async_engine.py", "--model", tiny_model, *engine_flags())
    tokens = re.findall(r"^request +(\d+): +(\d+) tokens", printed, re.M)
    assert sorted((int(i), int(n)) for i, n in tokens) == [
        (i, 16 if i % 3 else 160) for i in range(12)
    ]


def test_online_client(example, server):
    """All streams arrive whole from a running server."""
    printed = example("online_client.py", "--base-url", f"{server.url}/v1")
    assert len(re.findall(r"^request +\d+: +\d+ parts", printed, re.M)) == 12
