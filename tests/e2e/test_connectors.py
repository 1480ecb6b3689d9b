"""FastServe beside a user's own KV connector."""

import logging

import pytest
from tiny_engine import running, scheduler_of

from fastserve_vllm import LLM
from fastserve_vllm.kv_swap.connector import find_connector

CONFIG = {"base_quantum_s": 0.002, "num_levels": 5}


def example(path):
    """vLLM's example connector, which stores the KV cache of prompts in files."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(path)},
    }


def multi(path):
    """The same, as the user's own MultiConnector."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "engine_id": "mine",
        "kv_connector_extra_config": {"connectors": [example(path)]},
    }


@pytest.fixture
def periodic_log(caplog):
    """VLLM's logger of statistics, which exists only where its lines would be seen."""
    caplog.set_level(logging.INFO, logger="vllm")


@pytest.mark.parametrize("theirs", [example, multi])
def test_engine_runs_with_both(tiny_model, requests, stock_tokens, tmp_path, theirs, periodic_log):
    """Both connectors do their work: files are written, figures exported, tokens unchanged."""
    with running(
        LLM,
        tiny_model,
        fastserve_config=CONFIG,
        kv_transfer_config=theirs(tmp_path),
        disable_log_stats=False,
        max_num_seqs=4,
    ) as llm:
        scheduler = scheduler_of(llm)
        names = [type(c).__name__ for c in scheduler.connector.sub_connectors]
        assert names == ["FastServeConnector", "ExampleConnector"]
        assert find_connector(scheduler.connector).config.num_levels == 5
        assert requests.generate(llm) == stock_tokens
        scheduler.check_integrity()
        figures = {metric.name: metric for metric in llm.get_metrics()}
        assert figures["vllm:fastserve_started"].value >= len(requests.prompts)
    assert list(tmp_path.rglob("*.safetensors")), "the other connector stored nothing"


def test_stored_prompts_are_found_again(tiny_model, requests, stock_tokens, tmp_path):
    """A second engine loads what the first one stored, and generates the same tokens."""
    hits = []
    for _ in range(2):
        with running(
            LLM,
            tiny_model,
            fastserve_config=CONFIG,
            kv_transfer_config=example(tmp_path),
            disable_log_stats=False,
            max_num_seqs=4,
        ) as llm:
            assert requests.generate(llm) == stock_tokens
            figures = {metric.name: metric for metric in llm.get_metrics()}
            hits.append(figures["vllm:external_prefix_cache_hits"].value)
    assert hits[1] > hits[0]
