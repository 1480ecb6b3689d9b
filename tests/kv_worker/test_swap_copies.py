"""Every engine moves the bytes it is told to, in order, and outlives what goes wrong."""

import threading
import time

import pytest
import torch
from swap_rows import back, out, random_rows

from fastserve_vllm.kv_swap.copies import BlockRows, ThreadCopies, runs


def finish(engine):
    """Wait for everything; what finished, by transfer id."""
    engine.wait()
    return {finished.transfer.transfer_id: finished for finished in engine.poll()}


def on_host(tensor):
    """The rows, wherever they live."""
    return tensor.cpu()


@pytest.mark.parametrize("urgent", [False, True])
@pytest.mark.parametrize("blocks", [(4,), (2, 3, 4, 5), (7, 3, 4, 19, 0)], ids=str)
def test_what_comes_back_is_what_left(make_engine, rows, blocks, urgent):
    """Out, poison, in: equal bytes in the named blocks, and nothing else touched on either side."""
    engine = make_engine(rows)
    before = [on_host(stack).clone() for stack in rows.device]
    hosts = (9, 1, 2, 3, 15)[: len(blocks)]
    engine.submit(out(1, blocks, hosts, urgent=urgent))
    finish(engine)
    for stack in rows.device:
        stack[:, list(blocks)] = 0
    engine.submit(back(2, blocks, hosts, urgent=urgent))
    finish(engine)
    unused = [h for h in range(rows.host[0].shape[1]) if h not in hosts]
    for device, host, original in zip(rows.device, rows.host, before, strict=True):
        assert torch.equal(on_host(device), original)
        assert not host[:, unused].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_bytes_mean_nothing(make_engine, device, dtype):
    """Whatever a row holds, NaNs and infinities included, arrives bit by bit."""
    raw = torch.randint(-128, 128, (2, 6, 64), dtype=torch.int8, device=device)
    cache = raw.view(dtype)
    host = torch.zeros(2, 6, 64, dtype=torch.int8, pin_memory=device.type != "cpu")
    rows = BlockRows([cache.view(torch.int8)], [host])
    engine = make_engine(rows)
    engine.submit(out(1, range(6), range(6)))
    finish(engine)
    assert torch.equal(rows.host[0], raw.cpu())


def test_a_part_may_come_back_elsewhere(make_engine, rows):
    """Blocks out together need not come back together, nor to where they were."""
    engine = make_engine(rows)
    engine.submit(out(1, (2, 3, 4), (5, 6, 7)))
    finish(engine)
    engine.submit(back(2, (12, 11), (7, 5)))
    finish(engine)
    for stack in rows.device:
        assert torch.equal(stack[:, 12], stack[:, 4])
        assert torch.equal(stack[:, 11], stack[:, 2])


def test_bytes_and_seconds_are_counted(make_engine, rows):
    """Bytes over all regions; time only of what the caller had to wait for."""
    engine = make_engine(rows)
    engine.submit(out(1, (2, 3), (5, 6)))
    engine.submit(back(2, (7,), (5,), urgent=True))
    done = finish(engine)
    block = 3 * 256 + 96
    assert [done[i].copied_bytes for i in (1, 2)] == [2 * block, block]
    assert done[1].copy_s > 0
    assert done[1].waited_s == 0 < done[2].waited_s
    assert done[1].cause is None is done[2].cause


def test_nothing_to_copy_is_done(make_engine, rows):
    """A transfer without blocks finishes like any other."""
    engine = make_engine(rows)
    engine.submit(out(1, (), ()))
    assert finish(engine)[1].copied_bytes == 0


def test_polling_never_waits_and_tells_once(make_engine, rows):
    """Busy as long as there is something to tell."""
    engine = make_engine(rows)
    assert not engine.busy
    assert engine.poll() == []
    engine.submit(out(1, (2,), (5,)))
    assert engine.busy
    assert set(finish(engine)) == {1}
    assert engine.poll() == []
    assert not engine.busy


@pytest.mark.parametrize(
    ("transfer", "cause"),
    [
        (out(1, (2, 3), (5,)), "2 device blocks do not match 1 host blocks"),
        (out(1, (20,), (5,)), "device blocks 20 to 20 are not all below 20"),
        (back(1, (2, -1), (5, 6)), "device blocks -1 to 2 are not all below 20"),
        (out(1, (2,), (16,), urgent=True), "host blocks 16 to 16 are not all below 16"),
    ],
    ids=["uneven", "device", "negative", "host"],
)
def test_blocks_that_do_not_exist_are_never_touched(make_engine, rows, transfer, cause):
    """The transfer fails with its cause, and the engine goes on."""
    engine = make_engine(rows)
    engine.submit(transfer)
    engine.submit(out(2, (2,), (5,)))
    done = finish(engine)
    assert done[1].cause == cause
    assert done[1].copied_bytes == 0
    assert done[2].cause is None


@pytest.mark.parametrize("urgent", [False, True])
def test_a_copy_that_raises_fails_alone(make_engine, rows, monkeypatch, urgent):
    """Its cause is told; transfers before and after it are copied."""
    engine = make_engine(rows)
    fail_at(engine, monkeypatch, call=2)
    for i in (1, 2, 3):
        engine.submit(out(i, (i,), (i,), urgent=urgent))
    done = finish(engine)
    assert [done[i].cause for i in (1, 2, 3)] == [None, "OSError: cable pulled", None]
    for device, host in zip(rows.device, rows.host, strict=True):
        assert torch.equal(host[:, [1, 3]], on_host(device[:, [1, 3]]))


def fail_at(engine, monkeypatch, call):
    """Let the engine's nth copy raise."""
    calls = iter(range(1, 100))

    def failing(real):
        def copy(*args):
            if next(calls) == call:
                raise OSError("cable pulled")
            return real(*args)

        return copy

    if hasattr(engine, "_lanes"):
        for key, lane in engine._lanes.items():
            engine._lanes[key] = type(lane)(lane.stream, failing(lane.copy))
    else:
        monkeypatch.setattr(engine, "_copy_runs", failing(engine._copy_runs))


class Gate:
    """Holds a thread engine's copies back until opened."""

    def __init__(self, engine, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        self.order = []
        real = engine._copy_runs

        def gated(transfer):
            self.order.append(transfer.transfer_id)
            if not transfer.urgent:
                self.reached.set()
                assert self.open.wait(10)
            real(transfer)

        monkeypatch.setattr(engine, "_copy_runs", gated)


@pytest.fixture
def held(monkeypatch):
    """A thread engine, its rows, and a gate for its background copies."""
    rows = random_rows(torch.device("cpu"))
    engine = ThreadCopies(rows)
    gate = Gate(engine, monkeypatch)
    yield engine, rows, gate
    gate.open.set()
    engine.close()


def test_the_caller_computes_while_the_thread_copies(held):
    """Submitting and polling return with the copy still to come."""
    engine, _, gate = held
    engine.submit(out(1, (2,), (5,)))
    assert gate.reached.wait(10)
    assert engine.poll() == []
    assert engine.busy
    gate.open.set()
    assert set(finish(engine)) == {1}


def test_an_urgent_copy_overtakes_what_it_does_not_touch(held):
    """It is done when submit returns, with a background copy still under way."""
    engine, rows, gate = held
    engine.submit(out(1, (2,), (5,)))
    assert gate.reached.wait(10)
    engine.submit(out(2, (3,), (6,), urgent=True))
    assert torch.equal(rows.host[0][:, 6], rows.device[0][:, 3])
    assert [f.transfer.transfer_id for f in engine.poll()] == [2]


@pytest.mark.parametrize(
    "urgent",
    [back(2, (9,), (5,), urgent=True), out(2, (2,), (7,), urgent=True)],
    ids=["host", "device"],
)
def test_an_urgent_copy_waits_for_what_shares_a_block(held, urgent):
    """Even with a background copy that has not begun."""
    engine, _, gate = held
    engine.submit(out(1, (2,), (5,)))
    threading.Timer(0.05, gate.open.set).start()
    start = time.perf_counter()
    engine.submit(urgent)
    assert gate.order == [1, 2]
    (waited,) = [f.waited_s for f in engine.poll() if f.transfer.transfer_id == 2]
    assert 0.02 < waited <= time.perf_counter() - start


def test_background_copies_keep_their_order(held):
    """First in, first out."""
    engine, rows, gate = held
    gate.open.set()
    for i in range(5):
        engine.submit(out(2 * i, (i,), (3,)))
        engine.submit(back(2 * i + 1, (10 + i,), (3,)))
    finish(engine)
    assert gate.order == list(range(10))
    assert torch.equal(rows.device[0][:, 10:15], rows.device[0][:, :5])


def test_closing_finishes_what_was_submitted(held):
    """And may be done twice."""
    engine, rows, gate = held
    gate.open.set()
    engine.submit(out(1, (2,), (5,)))
    engine.close()
    engine.close()
    assert torch.equal(rows.host[0][:, 5], rows.device[0][:, 2])
    assert not engine._thread.is_alive()


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((), (), []),
        ((4,), (1,), [(4, 1, 1)]),
        ((4, 5, 6), (1, 2, 3), [(4, 1, 3)]),
        ((4, 5, 6), (1, 2, 4), [(4, 1, 2), (6, 4, 1)]),
        ((4, 3), (1, 2), [(4, 1, 1), (3, 2, 1)]),
        ((4, 4), (1, 2), [(4, 1, 1), (4, 2, 1)]),
    ],
)
def test_runs(one, other, expected):
    """A run ends where either side does not rise by one."""
    assert list(runs(one, other)) == expected
