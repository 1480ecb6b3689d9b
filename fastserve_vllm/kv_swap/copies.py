"""Copies whole blocks between device and host: the interface, and an engine for any device.

Every engine keeps to one rule: transfers that share a block run in the order in which they were
submitted, and urgent ones are done before anything that the caller computes next.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from fastserve_vllm.kv_swap.transfers import Direction, Transfer


@dataclass(frozen=True, slots=True)
class Finished:
    """A transfer that is over.

    Attributes:
        transfer: which.
        copied_bytes: bytes that arrived; 0 if it failed.
        copy_s: seconds from its first byte to its last.
        waited_s: seconds that the caller's computation stood still for it.
        cause: why it failed; None if it did not.
    """

    transfer: Transfer
    copied_bytes: int = 0
    copy_s: float = 0.0
    waited_s: float = 0.0
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class BlockRows:
    """What a block id names on either side: one row in each region of each stack.

    Attributes:
        device: [regions, device blocks, row bytes] for each stack of regions.
        host: [regions, host blocks, row bytes] likewise, as many and as long.
    """

    device: Sequence[torch.Tensor]
    host: Sequence[torch.Tensor]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all regions."""
        return sum(rows.shape[0] * rows.shape[2] for rows in self.device)

    def refusal(self, transfer: Transfer) -> str | None:
        """Why the transfer must not be tried; None if it can be."""
        device, host = transfer.device_blocks, transfer.host_blocks
        if len(device) != len(host):
            return f"{len(device)} device blocks do not match {len(host)} host blocks"
        for side, blocks, rows in (("device", device, self.device), ("host", host, self.host)):
            count = rows[0].shape[1] if rows else 0
            if blocks and not 0 <= min(blocks) <= max(blocks) < count:
                return f"{side} blocks {min(blocks)} to {max(blocks)} are not all below {count}"
        return None


class CopyEngine(ABC):
    """Carries out transfers. All methods belong to one thread and return without waiting.

    Attributes:
        submits_early: submitting is cheap; otherwise it is better hidden behind computation.
    """

    submits_early = True

    def __init__(self, rows: BlockRows) -> None:
        self._rows = rows
        self._finished: deque[Finished] = deque()

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether `poll` has, or will have, anything to say."""

    def mark(self) -> Any:
        """A point in the caller's computation: all that it has started so far."""
        return None

    def submit(self, transfer: Transfer, after: Any = None) -> None:
        """Start a transfer; an urgent one is done before what the caller computes next.

        Args:
            transfer: what to copy.
            after: from `mark`: copy once all up to there is computed; None: up to now.
        """
        cause = self._rows.refusal(transfer)
        if cause is None:
            self._start(transfer, after)
        else:
            self._finished.append(Finished(transfer, cause=cause))

    @abstractmethod
    def _start(self, transfer: Transfer, after: Any) -> None:
        """Start a transfer whose blocks exist."""

    @abstractmethod
    def poll(self) -> list[Finished]:
        """What has finished since the last call."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until all that was submitted has finished; `poll` then tells of it."""

    def close(self) -> None:
        """Finish what was submitted and let go of everything. Idempotent."""
        self.wait()


class SynchronousCopies(CopyEngine):
    """Copies while the caller waits."""

    def __init__(self, rows: BlockRows) -> None:
        super().__init__(rows)
        on_cpu = all(tensor.device.type == "cpu" for tensor in rows.device)
        # numpy copies on the thread that calls it. torch would start a second team of OpenMP
        # threads there, which fights the one that computes for the cores.
        self._assign: Any = np.copyto if on_cpu else torch.Tensor.copy_
        self._device = [tensor.numpy() if on_cpu else tensor for tensor in rows.device]
        self._host = [tensor.numpy() if on_cpu else tensor for tensor in rows.host]

    @property
    def busy(self) -> bool:
        """Whether finished transfers wait to be polled."""
        return bool(self._finished)

    def poll(self) -> list[Finished]:
        """What has finished since the last call."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def wait(self) -> None:
        """Nothing is ever in flight."""

    def _start(self, transfer: Transfer, after: Any) -> None:
        finished = self._copy(transfer)
        waited_s = finished.copy_s if transfer.urgent else 0.0
        self._finished.append(replace(finished, waited_s=waited_s))

    def _copy(self, transfer: Transfer) -> Finished:
        """Copy now; whatever goes wrong becomes the transfer's cause of failure."""
        start = time.perf_counter()
        try:
            self._copy_runs(transfer)
        except Exception as error:
            return Finished(transfer, cause=describe(error))
        copied = len(transfer.device_blocks) * self._rows.block_bytes
        return Finished(transfer, copied, time.perf_counter() - start)

    def _copy_runs(self, transfer: Transfer) -> None:
        """Copy each run of adjacent blocks at once, in all regions of a stack."""
        out = transfer.direction is Direction.OUT
        for device, host in zip(self._device, self._host, strict=True):
            for d, h, count in runs(transfer.device_blocks, transfer.host_blocks):
                on_device, on_host = device[:, d : d + count], host[:, h : h + count]
                if out:
                    self._assign(on_host, on_device)
                else:
                    self._assign(on_device, on_host)


class ThreadCopies(SynchronousCopies):
    """Copies on a thread of its own while the caller computes; urgent transfers at once.

    For devices that compute before their calls return: what was submitted reads only what has
    been computed. Memory is copied without Python's lock, so that both go on at once.
    """

    def __init__(self, rows: BlockRows) -> None:
        super().__init__(rows)
        self._in_flight: dict[int, Transfer] = {}
        self._jobs: SimpleQueue[Transfer | threading.Event | None] = SimpleQueue()
        self._results: SimpleQueue[Finished] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fastserve-kv-swap", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether transfers are in flight or wait to be polled."""
        return bool(self._in_flight or self._finished)

    def poll(self) -> list[Finished]:
        """What has finished since the last call."""
        self._collect()
        return super().poll()

    def wait(self) -> None:
        """Wait until all that was submitted has finished; `poll` then tells of it."""
        if self._in_flight:
            reached = threading.Event()
            self._jobs.put(reached)
            reached.wait()

    def close(self) -> None:
        """Finish what was submitted and end the thread. Idempotent."""
        self._jobs.put(None)
        self._thread.join()

    def _start(self, transfer: Transfer, after: Any) -> None:
        if not transfer.urgent:
            self._in_flight[transfer.transfer_id] = transfer
            self._jobs.put(transfer)
            return
        start = time.perf_counter()
        if any(share_blocks(transfer, other) for other in self._in_flight.values()):
            self.wait()
        finished = self._copy(transfer)
        self._finished.append(replace(finished, waited_s=time.perf_counter() - start))

    def _collect(self) -> None:
        while not self._results.empty():
            finished = self._results.get()
            del self._in_flight[finished.transfer.transfer_id]
            self._finished.append(finished)

    def _run(self) -> None:
        """The thread: copy in the order of submission until told to end."""
        while (job := self._jobs.get()) is not None:
            if isinstance(job, Transfer):
                self._results.put(self._copy(job))
            else:
                job.set()


def runs(one: Sequence[int], other: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Both sequences cut where either does not rise by one: (start, other's start, length)."""
    begin = 0
    for i in range(1, len(one) + 1):
        if i == len(one) or one[i] != one[i - 1] + 1 or other[i] != other[i - 1] + 1:
            yield one[begin], other[begin], i - begin
            begin = i


def share_blocks(one: Transfer, other: Transfer) -> bool:
    """Whether the transfers touch a common block, on either side."""
    return not (
        set(one.device_blocks).isdisjoint(other.device_blocks)
        and set(one.host_blocks).isdisjoint(other.host_blocks)
    )


def describe(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}"
