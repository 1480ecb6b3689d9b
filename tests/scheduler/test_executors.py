"""Executors under which no one scheduler decides for all workers, or hears all of them."""

import pytest
from vllm.v1.executor.abstract import Executor

from fastserve_vllm.config import ConfigError
from fastserve_vllm.host import check_executor
from fastserve_vllm.testing import ModelFreeEngine, vllm_config


@pytest.fixture
def config(tiny_model):
    """Of an engine with two pipeline stages."""
    return vllm_config(tiny_model, {}, pipeline_parallel_size=2)


def test_the_last_stage_alone_is_not_enough(config, monkeypatch):
    """0.32's older Ray executor passes nothing else on; without KV swap it may."""
    ray_executor = pytest.importorskip("vllm.v1.executor.ray_executor", reason="0.33 has none")
    older = ray_executor.RayDistributedExecutor
    monkeypatch.setattr(Executor, "get_class", lambda vllm_config: older)
    check_executor(config, swaps=False)
    with pytest.raises(ConfigError, match="last stage"):
        ModelFreeEngine(config)
    config.parallel_config.pipeline_parallel_size = 1
    check_executor(config, swaps=True)


@pytest.mark.host_versions
def test_a_scheduler_in_every_rank_is_refused(config):
    """They would decide differently; a single rank has nobody to differ from."""
    config.parallel_config.distributed_executor_backend = "external_launcher"
    config.parallel_config.world_size = 2
    with pytest.raises(ConfigError, match="external_launcher"):
        ModelFreeEngine(config)
    config.parallel_config.world_size = 1
    check_executor(config, swaps=True)
