"""Random steps leave and read the same bytes as if every copy had been done on the spot."""

import random
import time

import pytest
import torch
from fake_streams import FakeDevice, FakeStreamCopies
from swap_rows import allocate, back, kv_cache_config, out

from fastserve_vllm.kv_swap.copies import SynchronousCopies, ThreadCopies
from fastserve_vllm.kv_swap.metadata import SwapMetadata
from fastserve_vllm.kv_swap.transfers import Direction
from fastserve_vllm.kv_swap.worker import SwapWorker
from fastserve_vllm.testing import vllm_config

HOST_BLOCKS, DEVICE_BLOCKS, STEPS = 8, 16, 60


class Immediate:
    """A device that has computed once the call returns."""

    def enqueue(self, work):
        work()

    def run(self, pieces):
        """Nothing is left to do."""

    def synchronize(self):
        """Likewise."""


class SlowCopies(ThreadCopies):
    """A thread that takes its time at places that differ from run to run."""

    def _copy_runs(self, transfer):
        if not transfer.urgent:
            time.sleep(random.uniform(0, 4e-4))
        super()._copy_runs(transfer)


class World:
    """A worker, and the bytes that device and host should hold."""

    def __init__(self, config, monkeypatch, kind, rng):
        self.rng, self.next_id, self.in_flight = rng, 1, {}
        device = FakeDevice(rng) if kind == "streams" else Immediate()
        self.compute = getattr(device, "compute", device)
        self.device = device
        kv_config = kv_cache_config(num_blocks=DEVICE_BLOCKS)
        make = {
            "synchronous": SynchronousCopies,
            "thread": SlowCopies,
            "streams": lambda rows: FakeStreamCopies(rows, torch.device("cpu"), batched=False),
        }[kind]
        monkeypatch.setattr(torch, "get_device_module", lambda _: device)
        monkeypatch.setattr(SwapWorker, "_make_engine", lambda self, rows, device: make(rows))
        size = 3 * kv_config.kv_cache_tensors[0].block_stride
        self.worker = SwapWorker(config, kv_config, HOST_BLOCKS * size)
        self.worker.register_kv_caches(allocate(kv_config))
        self.rows = self.worker._engine._rows
        for stack in self.rows.host:
            stack.zero_()
        (self.expected_device,), (self.expected_host,) = (
            [stack.clone() for stack in side] for side in (self.rows.device, self.rows.host)
        )
        self.read, self.expected_read = [], []

    def transfers(self):
        """Up to four, of any kind; they may well share blocks."""
        for _ in range(self.rng.randrange(5)):
            count = self.rng.randrange(1, 5)
            device = self.rng.sample(range(DEVICE_BLOCKS), count)
            host = self.rng.sample(range(HOST_BLOCKS), count)
            make = self.rng.choice([out, back])
            yield make(self.next_id, device, host, urgent=self.rng.random() < 0.5)
            self.next_id += 1

    def step(self):
        """One step as vLLM's model runners take it."""
        transfers = tuple(self.transfers())
        self.in_flight |= {t.transfer_id: t for t in transfers if not t.urgent}
        self.worker.begin(SwapMetadata(transfers, flush=self.rng.random() < 0.05))
        for transfer in transfers:
            self.apply(transfer)
        if any(t.urgent and t.direction is Direction.IN for t in transfers):
            self.worker.submit()
        self.device.run(self.rng.randrange(12))
        self.forward()
        self.device.run(self.rng.randrange(12))
        self.worker.submit()
        self.device.run(self.rng.randrange(12))
        report = self.worker.take_report()
        for done in report.done if report else ():
            self.in_flight.pop(done, None)
        assert not (report and report.failed)

    def apply(self, transfer):
        """What the transfer does to the expected bytes."""
        device, host = list(transfer.device_blocks), list(transfer.host_blocks)
        if transfer.direction is Direction.OUT:
            self.expected_host[:, host] = self.expected_device[:, device]
        else:
            self.expected_device[:, device] = self.expected_host[:, host]

    def forward(self):
        """Compute reads and writes any blocks but those of background transfers."""
        fenced = {b for t in self.in_flight.values() for b in t.device_blocks}
        free = [b for b in range(DEVICE_BLOCKS) if b not in fenced]
        blocks = self.rng.sample(free, min(len(free), 3))
        value = self.rng.randrange(-128, 128)
        (device,) = self.rows.device
        self.expected_read.append(self.expected_device[:, blocks].clone())
        self.expected_device[:, blocks] = value
        self.compute.enqueue(lambda: self.read.append(device[:, blocks].clone()))
        self.compute.enqueue(lambda: device.__setitem__((slice(None), blocks), value))

    def finish(self):
        """Let everything end."""
        self.device.synchronize()
        self.worker.drain()


@pytest.mark.parametrize("kind", ["synchronous", "thread", "streams"])
@pytest.mark.parametrize("seed", range(12))
def test_copies_are_ordered(tiny_model, monkeypatch, kind, seed):
    """Every byte that computation reads, and that is left, is what it should be."""
    world = World(vllm_config(tiny_model), monkeypatch, kind, random.Random(seed))
    for _ in range(STEPS):
        world.step()
    world.finish()
    assert len(world.read) == len(world.expected_read) == STEPS
    for read, expected in zip(world.read, world.expected_read, strict=True):
        assert torch.equal(read, expected)
    assert torch.equal(world.rows.device[0], world.expected_device)
    assert torch.equal(world.rows.host[0], world.expected_host)
    world.worker.shutdown()
