"""Asynchronous scheduling on a real engine, through the test-only platform."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
STARVED = {"num_gpu_blocks_override": 33}


def generate(model, *arguments):
    """What `tests/support/generate.py` prints."""
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "generate.py"), str(model), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def stock(tiny_model):
    return generate(tiny_model, "--stock")


@pytest.mark.host_versions
def test_asynchronous_preemption_changes_no_token(tiny_model, stock):
    """Steps overlap, requests are paused and resumed, and every token equals stock vLLM's."""
    ours = generate(tiny_model)
    assert ours["async_scheduling"]
    assert stock["async_scheduling"]
    assert ours["paused"] > 50
    assert ours["tokens"] == stock["tokens"]
    assert ours["free_blocks"] == ours["blocks"]


@pytest.mark.parametrize("caching", [True, False])
def test_asynchronous_recompute_changes_no_token(tiny_model, stock, caching):
    """With KV for few requests, recomputation under overlapping steps changes no token either."""
    engine = {**STARVED, "enable_prefix_caching": caching, "max_num_batched_tokens": 128}
    ours = generate(tiny_model, "--engine", json.dumps({**engine, "enable_chunked_prefill": True}))
    assert ours["recomputed"] > 10
    assert ours["tokens"] == stock["tokens"]
    assert ours["free_blocks"] == ours["blocks"]
