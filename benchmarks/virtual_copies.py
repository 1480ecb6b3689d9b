"""KV copies in virtual time: the workers really copy, but a fixed bandwidth says for how long.

One channel in each direction, first come first served. What a channel takes for a token's KV is
given relative to prefilling that token. For a model with n parameters and b bytes of KV a token,
prefilling takes 2n / F seconds at F useful operations a second, copying b / W at W bytes a second:

* an 8B model with grouped queries (32 layers, 8 KV heads of 128, 16 bit: 128 KiB a token), 25 GB/s
  and 300 TFLOP/s: 5.2 us over 53 us, about 0.1, the default;
* OPT-13B (40 layers of 5120, 16 bit: 800 KiB a token), 25 GB/s and 200 TFLOP/s: 33 us over 130 us,
  about 0.25, the paper's setting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.virtual_clock import PREFILL_TOKEN_SECONDS
from fastserve_vllm.kv_swap.transfers import Report, Transfer

# Seconds of copying a token's KV one way over those of prefilling it.
COPY_RATIO = 0.1


def block_seconds(block_size: int, copy_ratio: float) -> float:
    """Seconds of copying one block one way."""
    return copy_ratio * PREFILL_TOKEN_SECONDS * block_size


@dataclass(frozen=True, slots=True)
class _Flight:
    """One transfer on its channel."""

    transfer: Transfer
    took_s: float
    end_s: float


class VirtualCopies:
    """Says when copies end, and holds the workers' reports of them back until then.

    Args:
        block_s: seconds that a channel takes for one block.
    """

    def __init__(self, block_s: float) -> None:
        self.block_s = block_s
        self._free_s: dict[str, float] = {}
        self._flights: dict[int, _Flight] = {}
        self._reported = Report()
        self._bytes: dict[int, int] = {}
        self._waited_s = 0.0

    def begin(self, transfers: Iterable[Transfer], now_s: float, *, flush: bool = False) -> float:
        """Queue a step's transfers.

        Args:
            transfers: in order.
            now_s: when the step was decided.
            flush: the step waits for everything that is in flight already.

        Returns:
            How many seconds the step stands still before it computes.
        """
        ends_s = [flight.end_s for flight in self._flights.values()] if flush else []
        for transfer in transfers:
            channel = transfer.direction.value
            took_s = self.block_s * len(transfer.device_blocks)
            end_s = max(self._free_s.get(channel, 0.0), now_s) + took_s
            self._free_s[channel] = end_s
            self._flights[transfer.transfer_id] = _Flight(transfer, took_s, end_s)
            if transfer.urgent:
                ends_s.append(end_s)
        waited_s = max([*ends_s, now_s]) - now_s
        self._waited_s += waited_s
        return waited_s

    def next_end_s(self) -> float | None:
        """When the next copy ends; None without any in flight."""
        return min((flight.end_s for flight in self._flights.values()), default=None)

    def hold(self, report: Report) -> None:
        """Take in what a worker says it has done; it has really copied by now."""
        self._reported = self._reported.merge(report)
        for way, copied in report.copied_bytes.items():
            done = [f.transfer for number, f in self._flights.items() if number in report.done]
            moved = [t for t in done if t.direction.value == way]
            blocks = sum(len(t.device_blocks) for t in moved if t.transfer_id not in report.failed)
            for transfer in moved:
                if transfer.transfer_id not in report.failed:
                    share = len(transfer.device_blocks) / blocks
                    self._bytes[transfer.transfer_id] = round(copied * share)

    def take_report(self, now_s: float) -> Report | None:
        """What has ended by now, in virtual seconds; None: nothing new."""
        over = [
            flight
            for number, flight in self._flights.items()
            if flight.end_s <= now_s and number in self._reported.done
        ]
        if not over:
            return None
        report = Report(waited_s=self._waited_s)
        self._waited_s = 0.0
        for flight in over:
            self._tell(flight, report)
        return report

    def _tell(self, flight: _Flight, report: Report) -> None:
        number, way = flight.transfer.transfer_id, flight.transfer.direction.value
        del self._flights[number]
        report.done[number] = self._reported.done.pop(number)
        cause = self._reported.failed.pop(number, None)
        if cause is not None:
            report.failed[number] = cause
        report.copied_bytes[way] = report.copied_bytes.get(way, 0) + self._bytes.pop(number, 0)
        report.copy_s[way] = report.copy_s.get(way, 0.0) + flight.took_s
