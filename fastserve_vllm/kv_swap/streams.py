"""Copies on side streams of a device (CUDA, ROCm, XPU) while it computes.

What orders copies is the compute stream: a copy waits for a point of it, and it waits for urgent
copies. So whatever is submitted later comes after all urgent copies, on any stream, and the host
never waits.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.simple_kv_offload.cuda_mem_ops import (
    CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
    build_params,
    copy_blocks,
)

from fastserve_vllm.kv_swap.copies import (
    BlockRows,
    CopyEngine,
    Finished,
    describe,
    runs,
    share_blocks,
)
from fastserve_vllm.kv_swap.transfers import Direction, Transfer

logger = init_logger(__name__)

Copy = Callable[[Sequence[int], Sequence[int]], None]
"""Enqueues a copy, given the blocks to read and the blocks to write."""


@dataclass(frozen=True, slots=True)
class Lane:
    """A stream for one direction and urgency, and what enqueues copies on it."""

    stream: Any
    copy: Copy


@dataclass(frozen=True, slots=True)
class InFlight:
    """A transfer on its way.

    Attributes:
        transfer: which.
        ready: event of the compute stream that it waits for.
        start: event before its first byte.
        done: event after its last.
    """

    transfer: Transfer
    ready: Any
    start: Any
    done: Any


class StreamCopies(CopyEngine):
    """Copies on streams of low priority, urgent transfers on streams of high priority.

    Args:
        rows: both sides; where the host's are not pinned, copies do not overlap computation.
        device: what computes.
        batched: copy by the driver's batches where it has them; otherwise by one call for each
            run of adjacent blocks in each region.
    """

    submits_early = False

    def __init__(self, rows: BlockRows, device: torch.device, *, batched: bool = True) -> None:
        super().__init__(rows)
        self._device = device
        self._torch: Any = torch.get_device_module(device)
        self._in_flight: list[InFlight] = []
        low, high = self._torch.Stream.priority_range()
        batched = batched and device.type == "cuda" and is_pin_memory_available()
        self._lanes = {
            (direction, urgent): self._lane(direction, high if urgent else low, batched=batched)
            for direction in Direction
            for urgent in (False, True)
        }

    @property
    def busy(self) -> bool:
        """Whether transfers are in flight or wait to be polled."""
        return bool(self._in_flight or self._finished)

    def mark(self) -> Any:
        """An event that occurs once the device has computed all that it was given so far."""
        event = self._event()
        event.record(self._torch.current_stream(self._device))
        return event

    def poll(self) -> list[Finished]:
        """What has finished since the last call."""
        in_flight, self._in_flight = self._in_flight, []
        for one in in_flight:
            finished = self._outcome(one)
            if finished is None:
                self._in_flight.append(one)
            else:
                self._finished.append(finished)
        finished_now = list(self._finished)
        self._finished.clear()
        return finished_now

    def wait(self) -> None:
        """Wait until all that was submitted has finished; `poll` then tells of it."""
        for one in self._in_flight:
            with suppress(Exception):  # A device that failed says so again when polled.
                one.done.synchronize()

    def _start(self, transfer: Transfer, after: Any) -> None:
        lane = self._lanes[transfer.direction, transfer.urgent]
        ready = self.mark() if after is None else after
        one = InFlight(transfer, ready, self._event(), self._event())
        lane.stream.wait_event(ready)
        for other in self._in_flight:
            if share_blocks(transfer, other.transfer):
                lane.stream.wait_event(other.done)
        try:
            self._enqueue(one, lane)
        except Exception as error:
            self._fail(transfer, lane, error)
        else:
            self._in_flight.append(one)

    def _enqueue(self, one: InFlight, lane: Lane) -> None:
        one.start.record(lane.stream)
        lane.copy(*_blocks(one.transfer))
        one.done.record(lane.stream)
        if one.transfer.urgent:
            self._torch.current_stream(self._device).wait_event(one.done)

    def _fail(self, transfer: Transfer, lane: Lane, error: Exception) -> None:
        """Report a transfer that could not be enqueued, once what had been is over."""
        with suppress(Exception):
            lane.stream.synchronize()
        self._finished.append(Finished(transfer, cause=describe(error)))

    def _outcome(self, one: InFlight) -> Finished | None:
        """How the transfer ended; None if it has not yet."""
        try:
            if not one.done.query():
                return None
            copy_s = one.start.elapsed_time(one.done) / 1e3
            # From where the compute stream would have gone on to where it may.
            waited_s = one.ready.elapsed_time(one.done) / 1e3 if one.transfer.urgent else 0.0
        except Exception as error:
            return Finished(one.transfer, cause=describe(error))
        copied = len(one.transfer.device_blocks) * self._rows.block_bytes
        return Finished(one.transfer, copied, copy_s, waited_s)

    def _event(self) -> Any:
        return self._torch.Event(enable_timing=True)

    def _lane(self, direction: Direction, priority: int, *, batched: bool) -> Lane:
        stream = self._torch.Stream(device=self._device, priority=priority)
        device = [region for stack in self._rows.device for region in stack.unbind()]
        host = [region for stack in self._rows.host for region in stack.unbind()]
        sources, targets = (device, host) if direction is Direction.OUT else (host, device)
        if batched:
            try:
                return Lane(stream, _batched_copy(sources, targets, stream))
            except Exception as error:
                logger.warning_once(
                    "KV swap: this driver has no batched copies (%s); blocks are copied one run "
                    "at a time.",
                    describe(error),
                )
        return Lane(stream, self._torch_copy(sources, targets, stream))

    def _torch_copy(
        self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], stream: Any
    ) -> Copy:
        """Copies by torch, one call for each run of adjacent blocks in each region."""

        def copy(read: Sequence[int], write: Sequence[int]) -> None:
            with self._torch.stream(stream):
                for source, target in zip(sources, targets, strict=True):
                    for r, w, count in runs(read, write):
                        target[w : w + count].copy_(source[r : r + count], non_blocking=True)

        return copy


def _batched_copy(
    sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], stream: Any
) -> Copy:
    """Copies by the driver, all blocks of all regions in one call."""
    # Even from the host, rows are read in stream order and no earlier: an urgent transfer may
    # have been told to write them a moment ago.
    params = build_params(
        {str(i): rows for i, rows in enumerate(sources)},
        {str(i): rows for i, rows in enumerate(targets)},
        stream,
        CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
    )
    return lambda read, write: copy_blocks(list(read), list(write), params)


def _blocks(transfer: Transfer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks to read and blocks to write."""
    if transfer.direction is Direction.OUT:
        return transfer.device_blocks, transfer.host_blocks
    return transfer.host_blocks, transfer.device_blocks
