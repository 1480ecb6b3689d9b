"""Every engine that can run here, in turn."""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch
from swap_rows import random_rows

from fastserve_vllm.kv_swap.copies import SynchronousCopies, ThreadCopies
from fastserve_vllm.kv_swap.streams import StreamCopies

ENGINES = {
    "synchronous": lambda rows, device: SynchronousCopies(rows),
    "thread": lambda rows, device: ThreadCopies(rows),
    "streams": StreamCopies,
    "streams-by-torch": lambda rows, device: StreamCopies(rows, device, batched=False),
}


def pytest_collection_modifyitems(items):
    """Without an accelerator, tests of one are skipped and say so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))


@pytest.fixture(
    params=[
        "synchronous",
        "thread",
        pytest.param("streams", marks=pytest.mark.gpu),
        pytest.param("streams-by-torch", marks=pytest.mark.gpu),
    ]
)
def engine_name(request):
    """Each engine in turn."""
    return request.param


@pytest.fixture
def device(engine_name):
    """Where the engine's KV cache lives."""
    return torch.device("cuda" if engine_name.startswith("streams") else "cpu")


@pytest.fixture
def make_engine(engine_name, device):
    """Builds the engine on given rows; closes it at the end."""
    engines = []

    def make(rows):
        engines.append(ENGINES[engine_name](rows, device))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def rows(device):
    """Two stacks of regions, random on the device and zero on the host."""
    return random_rows(device)
