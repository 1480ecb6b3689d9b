"""What KV swap's workers import from vLLM is in the contract, and does what they count on."""

import ast
import ctypes
import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.simple_kv_offload import cuda_mem_ops

from fastserve_vllm.contract import CONTRACT
from fastserve_vllm.kv_swap import host_memory, layout, metadata, streams, worker

pytestmark = pytest.mark.host_versions

# Names that any plugin of vLLM's uses; they are checked by their use.
_COMMON = {"vllm.config:VllmConfig", "vllm.logger:init_logger"}


def imported(module):
    """ "module:name" of everything that the module imports from vLLM."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    "module", [host_memory, layout, metadata, streams, worker], ids=lambda m: m.__name__
)
def test_contract_names_every_import(module):
    """A name that moves is then reported at start-up, with what it is needed for."""
    listed = {".".join(seam.path.split(".")) for seam in CONTRACT}
    listed |= {f"{path.split(':')[0]}:{path.split(':')[1].split('.')[0]}" for path in listed}
    assert set(imported(module)) <= listed | _COMMON


class Driver:
    """A driver's batched copy that copies at once and remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, targets, sources, sizes, count, attributes, *rest):
        order = ctypes.cast(attributes, ctypes.POINTER(ctypes.c_uint))[0]
        self.calls.append((count, order, rest[-1]))
        read = [(ctypes.c_uint64 * count).from_address(a) for a in (targets, sources, sizes)]
        for target, source, size in zip(*read, strict=True):
            ctypes.memmove(target, source, size)
        return 0


@pytest.fixture
def driver(monkeypatch):
    """vLLM's batched copies, on a driver of ours."""
    driver = Driver()
    monkeypatch.setattr(cuda_mem_ops, "_batch_memcpy", (driver, 1))
    return driver


def test_batched_copies_move_the_blocks_that_are_named(driver):
    """Block ids are rows of every region; the source is read in the order of the stream."""
    sources = [torch.randint(-128, 128, (6, n), dtype=torch.int8) for n in (48, 16)]
    targets = [torch.zeros(4, n, dtype=torch.int8) for n in (48, 16)]
    copy = streams._batched_copy(sources, targets, SimpleNamespace(cuda_stream=7))
    copy((5, 0), (1, 3))
    assert driver.calls == [(4, 1, 7)]
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target[[1, 3]], source[[5, 0]])
        assert not target[[0, 2]].any()


def test_a_driver_that_refuses_raises(monkeypatch):
    """So the transfer is reported as failed."""
    monkeypatch.setattr(cuda_mem_ops, "_batch_memcpy", (lambda *_: 999, 1))
    rows = [torch.zeros(2, 8, dtype=torch.int8)]
    copy = streams._batched_copy(rows, rows, SimpleNamespace(cuda_stream=0))
    with pytest.raises(RuntimeError, match="999"):
        copy((0,), (1,))
