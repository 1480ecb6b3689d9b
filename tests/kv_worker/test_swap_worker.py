"""A worker's step: what it starts when, what it reports, and what it refuses to start with."""

import pickle
import threading
import time

import pytest
import torch
from swap_rows import allocate, attention, back, kv_cache_config, out
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec

from fastserve_vllm.config import ConfigError
from fastserve_vllm.kv_swap import host_memory, worker
from fastserve_vllm.kv_swap.copies import SynchronousCopies, ThreadCopies
from fastserve_vllm.kv_swap.host_memory import HostMemory, available_bytes
from fastserve_vllm.kv_swap.metadata import SwapMetadata, SwapWorkerMetadata
from fastserve_vllm.kv_swap.transfers import Report
from fastserve_vllm.kv_swap.worker import SwapWorker, block_bytes
from fastserve_vllm.testing import vllm_config

pytestmark = pytest.mark.host_versions

KV = kv_cache_config()
BLOCK = 3 * attention().page_size_bytes
IDLE = SwapMetadata()


@pytest.fixture
def config(tiny_model):
    """vLLM's configuration of a model with two layers."""
    return vllm_config(tiny_model)


@pytest.fixture
def kv_caches():
    """A KV cache of ten blocks in three layers."""
    return allocate(KV)


@pytest.fixture(params=[False, True], ids=["thread", "synchronous"])
def swap_worker(request, config, kv_caches, monkeypatch):
    """A worker with eight host blocks."""
    monkeypatch.setattr(SwapWorker, "synchronous", request.param)
    made = SwapWorker(config, KV, 8 * BLOCK)
    made.register_kv_caches(kv_caches)
    yield made
    made.shutdown()


def step(swap_worker, *transfers, flush=False):
    """Begin a step and end it, with nothing computed in between."""
    swap_worker.begin(SwapMetadata(transfers, flush=flush))
    swap_worker.submit()
    return swap_worker.take_report()


def settle(swap_worker):
    """The report once everything in flight is done."""
    swap_worker.drain()
    return swap_worker.take_report()


def pages(kv_caches, block):
    """The block in every layer."""
    return [cache[block].clone() for cache in kv_caches.values()]


def clear(kv_caches, block):
    for cache in kv_caches.values():
        cache[block] = 0


def same(one, other):
    return all(
        torch.equal(a.view(torch.int8), b.view(torch.int8)) for a, b in zip(one, other, strict=True)
    )


def test_a_request_leaves_and_returns(swap_worker, kv_caches):
    """In every layer, to other blocks than it came from."""
    before = pages(kv_caches, 4)
    swap_worker.begin(SwapMetadata((out(1, (4,), (6,)),)))
    swap_worker.submit()
    settle(swap_worker)
    clear(kv_caches, 4)
    swap_worker.begin(SwapMetadata((back(2, (7,), (6,)),)))
    swap_worker.submit()
    assert settle(swap_worker).done == {2: 1}
    assert same(pages(kv_caches, 7), before)


def test_urgent_copies_out_are_done_before_anything_else(swap_worker, kv_caches):
    """Their device blocks may be written as soon as `begin` returns."""
    before = pages(kv_caches, 4)
    swap_worker.begin(SwapMetadata((out(1, (4,), (6,), urgent=True),)))
    clear(kv_caches, 4)
    swap_worker.submit()
    step(swap_worker, back(2, (4,), (6,), urgent=True))
    assert same(pages(kv_caches, 4), before)


def test_urgent_copies_in_wait_for_submit(swap_worker, kv_caches):
    """What vLLM itself does to a block before it loads into it comes before the copy."""
    step(swap_worker, out(1, (4,), (6,), urgent=True))
    before = pages(kv_caches, 4)
    swap_worker.begin(SwapMetadata((back(2, (4,), (6,), urgent=True),)))
    clear(kv_caches, 4)
    swap_worker.submit()
    assert same(pages(kv_caches, 4), before)


def test_a_host_block_may_change_hands_within_a_step(swap_worker, kv_caches):
    """In what is left by a copy in that is listed first, a copy out may go, urgent or not."""
    step(swap_worker, out(1, (4,), (6,), urgent=True))
    before, other = pages(kv_caches, 4), pages(kv_caches, 5)
    step(
        swap_worker,
        back(2, (8,), (6,), urgent=True),
        out(3, (5,), (6,), urgent=True),
        back(4, (9,), (6,), urgent=True),
    )
    assert same(pages(kv_caches, 8), before)
    assert same(pages(kv_caches, 9), other)


def test_a_flush_finishes_what_is_in_flight(swap_worker):
    """Before the step computes; the step's report tells of it."""
    step(swap_worker, out(1, (4,), (6,)))
    report = step(swap_worker, flush=True)
    assert report is None or report.done == {1: 1}
    assert not swap_worker._engine.busy


def test_a_step_that_ended_early_loses_nothing(swap_worker):
    """What was not submitted then is submitted with the next step."""
    swap_worker.begin(SwapMetadata((back(1, (4,), (6,), urgent=True),)))
    swap_worker.begin(IDLE)
    assert settle(swap_worker).done == {1: 1}


def test_a_report_says_what_was_copied(swap_worker):
    """In bytes, seconds and transfers."""
    swap_worker.begin(SwapMetadata((out(1, (4, 5), (6, 7)), out(2, (1,), (2,), urgent=True))))
    swap_worker.submit()
    report = settle(swap_worker)
    assert report.done == {1: 1, 2: 1}
    assert report.failed == {}
    assert report.copies == {"0,out": 2}
    assert report.copied_bytes == {"out": 3 * BLOCK}
    assert set(report.copy_s) == {"out"}
    assert report.waited_s > 0
    assert swap_worker.take_report() is None


def test_a_failed_copy_is_told_at_the_end_of_its_step(swap_worker):
    """If it is urgent: so that the step's output can be held back. Others may end later."""
    swap_worker.begin(
        SwapMetadata(
            (
                back(1, (4, 5), (6, 99), urgent=True),
                back(2, (7,), (99,)),
                out(3, (8,), (99,), urgent=True),
            )
        )
    )
    swap_worker.submit()
    at_once = swap_worker.take_report()
    assert {1, 3} <= set(at_once.failed)
    if 2 not in at_once.failed:
        assert set(settle(swap_worker).failed) == {2}
    assert at_once.copies == at_once.copied_bytes == {}


def test_a_copy_that_stalls_raises(swap_worker, monkeypatch):
    """Steps that do not wait for it would go on for ever; once it has finished, they may."""
    if swap_worker.synchronous:
        pytest.skip("copies while the caller waits: vLLM's limit for a step sees it")
    ends, copy = threading.Event(), SynchronousCopies._copy_runs

    def stalls(self, transfer):
        ends.wait()
        copy(self, transfer)

    monkeypatch.setattr(SynchronousCopies, "_copy_runs", stalls)
    assert step(swap_worker, out(1, (4,), (6,))) is None
    swap_worker.stall_s = 0.0
    with pytest.raises(RuntimeError, match="copy 1 has not finished"):
        swap_worker.take_report()
    ends.set()
    assert settle(swap_worker).done == {1: 1}


def test_a_cause_is_logged_once(swap_worker, monkeypatch):
    """However many transfers it fails."""
    lines = []
    monkeypatch.setattr(worker.logger, "error", lambda text, *args: lines.append(text % args))
    for i in range(5):
        step(swap_worker, out(i, (4,), (99,), urgent=True))
    assert lines == ["KV swap: a copy out failed: host blocks 99 to 99 are not all below 8"]


def test_an_idle_step_costs_nothing(swap_worker):
    """The three calls together take a microsecond, and nothing is returned."""

    def idle_step():
        swap_worker.begin(IDLE)
        swap_worker.submit()
        return swap_worker.take_report()

    assert idle_step() is None
    best = min(timed(idle_step, 200) for _ in range(50))
    assert best < 5e-6, f"{best * 1e6:.2f} us"


def timed(call, count):
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def test_engines_by_device(config, kv_caches, monkeypatch):
    """A thread on the CPU; none where copies are to be synchronous."""
    assert engine_of(config, kv_caches) is ThreadCopies
    monkeypatch.setattr(SwapWorker, "synchronous", True)
    assert engine_of(config, kv_caches) is SynchronousCopies


def engine_of(config, kv_caches):
    made = SwapWorker(config, KV, BLOCK)
    made.register_kv_caches(kv_caches)
    kind = type(made._engine)
    made.shutdown()
    return kind


def test_shutdown_is_final_and_may_be_repeated(swap_worker):
    """Nothing in flight is lost; steps of an engine that ends do no harm."""
    swap_worker.begin(SwapMetadata((out(1, (4,), (6,)),)))
    swap_worker.submit()
    swap_worker.shutdown()
    swap_worker.shutdown()
    swap_worker.begin(IDLE)
    swap_worker.submit()


def test_layers_that_cannot_be_swapped_are_refused_at_start(config):
    """Before any memory is taken."""
    mamba = MambaSpec(block_size=4, shapes=((2, 3),), dtypes=(torch.float32,))
    with pytest.raises(ConfigError, match="MambaSpec"):
        SwapWorker(config, KVCacheConfig(4, [], [KVCacheGroupSpec(["layers.0"], mamba)]), BLOCK)


def test_a_model_without_kv_cache_starts(config):
    """With nothing to copy."""
    made = SwapWorker(config, KVCacheConfig(1, [], []), BLOCK)
    made.register_kv_caches({})
    assert made.host_blocks == 0
    assert step(made) is None


def test_pipeline_stages_take_the_first_one_s_count(config, kv_caches, monkeypatch):
    """Layers of unequal size make stages count differently; the scheduler counts as rank 0."""
    config.parallel_config.pipeline_parallel_size = 2

    class Group:
        def broadcast_object(self, obj, src):
            assert src == 0
            return obj - 3

    monkeypatch.setattr(worker, "get_pp_group", Group)
    made = SwapWorker(config, KV, 8 * block_bytes(config, KV))
    made.register_kv_caches(kv_caches)
    assert made.host_blocks == 5
    assert made._engine._rows.host[0].shape[1] == 5
    made.shutdown()


def test_more_host_memory_than_there_is_is_refused(config, kv_caches):
    """With what was asked, what is available, and which field to lower."""
    made = SwapWorker(config, KV, 1 << 60)
    asked = (1 << 60) // BLOCK * BLOCK
    with pytest.raises(RuntimeError) as error:
        made.register_kv_caches(kv_caches)
    text = str(error.value)
    assert f"asks for {asked} bytes" in text
    assert "bytes are available" in text
    assert "--fastserve-config.swap_space_gib" in text


def test_an_allocation_that_fails_is_refused_alike(monkeypatch):
    """Whatever the system says goes into the message."""

    def empty(*args, **kwargs):
        raise RuntimeError("you tried to allocate too much")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(RuntimeError, match=r"asks for 64 bytes.*tried to allocate too much"):
        HostMemory(4, [(1, 16)], torch.device("cpu"))


@pytest.mark.parametrize(
    ("limit", "used", "idle", "expected"),
    [
        ("max", 10, 0, 1024 * 500),
        ("300000", 100_000, 0, 200_000),
        ("300000", 100_000, 60_000, 260_000),
        ("300000", 400_000, 0, 0),
    ],
)
def test_available_memory_respects_a_container(tmp_path, monkeypatch, limit, used, idle, expected):
    """What the control group still grants, its idle file pages counted as free."""
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 500 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {idle}\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() == expected


def test_available_memory_without_linux(tmp_path, monkeypatch):
    """All there is, for want of a better figure."""
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() > 1 << 28


def test_metadata_crosses_processes():
    """Both ways, with equal content."""
    there = SwapMetadata((out(1, (4, 5), (6, 7)), back(2, (1,), (3,), urgent=True)), flush=True)
    home = SwapWorkerMetadata(Report({1: 1}, {1: "cause"}, {"out": 5}, {"out": 0.5}, 0.25))
    for metadata in (there, home):
        assert pickle.loads(pickle.dumps(metadata)) == metadata
    assert bool(home)


def test_workers_reports_merge():
    """Transfers are done once every worker has said so; bytes add up, waiting does not."""
    one = SwapWorkerMetadata(Report({1: 1, 2: 1}, {2: "cause"}, {"out": 5}, {"out": 0.5}, 0.25))
    other = SwapWorkerMetadata(Report({1: 1}, {}, {"out": 5, "in": 1}, {"in": 0.5}, 0.75))
    assert one.aggregate(other).report == Report(
        {1: 2, 2: 1}, {2: "cause"}, {"out": 10, "in": 1}, {"out": 0.5, "in": 0.5}, 0.75
    )


def test_strangers_do_not_merge():
    """Another connector's report would be lost in ours."""
    with pytest.raises(TypeError, match="object"):
        SwapWorkerMetadata(Report()).aggregate(object())


def test_start_is_logged(config, kv_caches, monkeypatch):
    """Blocks, memory and device."""
    lines = []
    monkeypatch.setattr(worker.logger, "info", lambda text, *args: lines.append(text % args))
    engine_of(config, kv_caches)
    assert lines == ["KV swap: 1 host blocks (0.00 GiB) for cpu"]
