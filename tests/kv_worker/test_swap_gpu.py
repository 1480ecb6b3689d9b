"""Copies on side streams keep their order against kernels that run for long, and do not wait."""

import time

import pytest
import torch
from swap_rows import allocate, back, kv_cache_config, out, random_rows

from fastserve_vllm.kv_swap.host_memory import HostMemory
from fastserve_vllm.kv_swap.streams import StreamCopies
from fastserve_vllm.kv_swap.worker import SwapWorker, block_bytes
from fastserve_vllm.testing import vllm_config

pytestmark = pytest.mark.gpu

LONG = 500_000_000  # Clock cycles: a quarter of a second or more.
SHAPES = ((8, 1 << 20),)


@pytest.fixture(params=[True, False], ids=["batched", "by-torch"])
def engine(request):
    """Copies 8 MiB a block."""
    device = torch.device("cuda")
    made = StreamCopies(random_rows(device, SHAPES), device, batched=request.param)
    torch.cuda.synchronize()
    yield made
    made.close()


@pytest.fixture
def rows(engine):
    """The device's stack and the host's."""
    return engine._rows.device[0], engine._rows.host[0]


def test_a_copy_out_waits_for_the_kernel_that_writes(engine, rows):
    """However long that one runs."""
    device, host = rows
    torch.cuda._sleep(LONG)
    device[:, 2] = 7
    engine.submit(out(1, (2,), (3,)))
    engine.wait()
    assert (host[:, 3] == 7).all()


def test_a_copy_in_waits_for_the_kernel_that_reads(engine, rows):
    """Its target may have belonged to a request whose last step still runs."""
    device, _ = rows
    before = device[:, 2].clone()
    torch.cuda._sleep(LONG)
    read = device[:, 2].clone()
    engine.submit(back(1, (2,), (3,)))
    engine.wait()
    torch.cuda.synchronize()
    assert torch.equal(read, before)


def test_computation_waits_for_urgent_copies(engine, rows):
    """The next kernel may overwrite what was copied out, and read what was copied in."""
    device, host = rows
    before = device[:, :8].clone()
    engine.submit(out(1, range(8), range(8), urgent=True))
    device[:, :8] = 0
    engine.submit(back(2, range(8, 16), range(8), urgent=True))
    read = device[:, 8:16].clone()
    torch.cuda.synchronize()
    assert torch.equal(host[:, :8], before.cpu())
    assert torch.equal(read, before)
    assert not device[:, :8].any()


def test_the_host_never_waits(engine):
    """Submitting and polling return while the kernel before the copy still runs."""
    engine.submit(out(1, (1,), (1,)))  # What the driver sets up once.
    engine.wait()
    engine.poll()
    torch.cuda._sleep(LONG)
    start = time.perf_counter()
    engine.submit(out(2, range(8), range(8)))
    engine.submit(back(3, range(8, 16), range(8, 16), urgent=True))
    assert engine.poll() == []
    assert time.perf_counter() - start < 0.05
    engine.wait()
    assert {finished.transfer.transfer_id for finished in engine.poll()} == {2, 3}


def test_background_copies_overlap_computation(engine):
    """Submitted after a kernel, but marked before it: they are over while it runs."""
    ready = engine.mark()
    torch.cuda._sleep(4 * LONG)
    computed = torch.cuda.Event()
    computed.record()
    engine.submit(out(1, (1,), (1,)), ready)
    engine.wait()
    assert not computed.query()
    torch.cuda.synchronize()


def test_waiting_is_measured(engine):
    """An urgent copy's seconds are those in which the compute stream stood still."""
    engine.submit(out(1, range(16), range(16), urgent=True))
    engine.wait()
    (finished,) = engine.poll()
    assert 0 < finished.copy_s <= finished.waited_s < 1


@pytest.mark.parametrize("make", [out, back])
def test_bandwidth(engine, make):
    """Beyond what pageable memory could reach on the slowest of links."""
    for i in range(3):
        engine.submit(make(i, range(16), range(16)))
    engine.wait()
    best = max(finished.copied_bytes / finished.copy_s for finished in engine.poll())
    print(f"\n{make.__name__}: {best / 1e9:.1f} GB/s")
    assert best > 2e9


def test_host_memory_is_pinned_and_let_go():
    """Again and again, at the same address or another."""
    for _ in range(3):
        memory = HostMemory(4, [(2, 1 << 16)], torch.device("cuda"))
        assert memory.rows[0].is_pinned()
        memory.close()
        memory.close()


def test_a_worker_swaps_on_the_device(tiny_model):
    """From the KV cache as vLLM allocates it there, and back."""
    config, kv = vllm_config(tiny_model), kv_cache_config()
    kv_caches = allocate(kv, device="cuda")
    worker = SwapWorker(config, kv, 8 * block_bytes(config, kv))
    worker.register_kv_caches(kv_caches)
    assert type(worker._engine) is StreamCopies
    before = {name: cache[4].clone() for name, cache in kv_caches.items()}
    worker._engine.submit(out(1, (4,), (6,), urgent=True))
    for cache in kv_caches.values():
        cache[4] = 0
    worker._engine.submit(back(2, (4,), (6,), urgent=True))
    for name, cache in kv_caches.items():
        assert torch.equal(cache[4].view(torch.int8), before[name].view(torch.int8))
    worker.shutdown()
