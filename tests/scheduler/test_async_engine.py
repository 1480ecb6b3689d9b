"""Asynchronous scheduling on a real engine, through the test-only platform."""

import json

import pytest
from subprocess_generate import generate

STARVED = {"num_gpu_blocks_override": 33}


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


@pytest.mark.host_versions
@pytest.mark.parametrize(
    ("mode", "caching"), [("proactive", False), ("reactive", True), ("recompute", True)]
)
def test_short_of_memory_no_token_changes(tiny_model, stock, mode, caching):
    """KV cache for few requests, overlapping steps, blocks poisoned before they are refilled."""
    engine = {**STARVED, "enable_prefix_caching": caching, "max_num_batched_tokens": 128}
    arguments = ["--engine", json.dumps({**engine, "enable_chunked_prefill": True})]
    arguments += ["--fastserve", json.dumps({"swap_mode": mode, "swap_space_gib": 0.1})]
    ours = generate(tiny_model, *arguments, poison=True)
    moved = ours["spilled"] + ours["swapped_out"]
    assert (ours["recomputed"] if mode == "recompute" else moved) > 10
    assert ours["tokens"] == stock["tokens"]
    assert ours["free_blocks"] == ours["blocks"]
    assert not ours.get("host_blocks_held")


@pytest.mark.host_versions
@pytest.mark.parametrize("mode", ["reactive", "proactive"])
def test_copies_that_fail_change_no_token(tiny_model, mode):
    """Every fifth copy fails while steps overlap and prompts share their first blocks: nobody
    computes on what never arrived, and no output computed on it is delivered.
    """
    shared = ["--shared-prefix", "96"]
    engine = {**STARVED, "max_num_batched_tokens": 128, "enable_chunked_prefill": True}
    arguments = [*shared, "--engine", json.dumps(engine)]
    arguments += ["--fastserve", json.dumps({"swap_mode": mode, "swap_space_gib": 0.1})]
    stock = generate(tiny_model, "--stock", *shared)
    ours = generate(tiny_model, *arguments, poison=True, fail=5)
    assert ours["failed"] >= 5
    assert ours["tokens"] == stock["tokens"]
    assert ours["free_blocks"] == ours["blocks"]
    assert not ours.get("host_blocks_held")
