"""For every test: the environment in which vLLM runs small, and a tiny model.

The environment is set here, before anything imports vLLM. Values already set win.
"""

import os
from pathlib import Path

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # A second OpenMP thread on a shared machine makes a step swing from 2 to 280 ms.
    "OMP_NUM_THREADS": "1",
    # Engines live in the test's own process, where the scheduler can be looked at.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402

from scripts.tiny_model import build_tiny_model  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of a seeded float32 Llama with two layers; made once and kept in the checkout."""
    try:
        return str(build_tiny_model(ROOT / ".models" / "tiny-llama"))
    except OSError:
        return str(build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama"))


@pytest.fixture(scope="session")
def subprocess_env():
    """Environment for programs that tests start: as ours, with engines in processes of their own.

    `PYTHONPATH` is inherited, so that another vLLM laid over the installed one is used there too.
    """
    return {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
