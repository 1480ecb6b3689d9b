"""Virtual time on a live engine: what its steps and its KV copies take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.virtual_clock import STEP_BASE_SECONDS, StepShape, VirtualClock
from benchmarks.virtual_copies import VirtualCopies
from fastserve_vllm.kv_swap.transfers import Report


class VirtualTime:
    """A `StepTime` on a virtual clock.

    The clock moves when a step has been decided. So the step's tokens carry the time of its end,
    and the next decision reads it too.

    Args:
        clock: the run's.
        copies: what copies take.
        carry: makes a model runner's output that carries another report, or none.
    """

    def __init__(
        self,
        clock: VirtualClock,
        copies: VirtualCopies,
        carry: Callable[[Any, Report | None], Any],
    ) -> None:
        self._clock = clock
        self._copies = copies
        self._carry = carry

    def scheduled(self, step: Any, shape: StepShape) -> None:
        """Begin the step's copies, wait for the urgent ones, and let the step take its time."""
        metadata = getattr(step, "kv_connector_metadata", None)
        transfers = getattr(metadata, "transfers", ())
        flush = getattr(metadata, "flush", False)
        self._clock.advance(self._copies.begin(transfers, self._clock(), flush=flush))
        self._clock.advance(self._step_s(shape))

    def finished(self, output: Any) -> Any:
        """Replace the workers' report by one of the copies that have ended in virtual time."""
        connector_output = output.kv_connector_output
        metadata = connector_output and connector_output.kv_connector_worker_meta
        if metadata is not None:
            self._copies.hold(metadata.report)
        report = self._copies.take_report(self._clock())
        return output if metadata is report is None else self._carry(output, report)

    def _step_s(self, shape: StepShape) -> float:
        """Without anything to compute, the engine looks again as soon as a copy ends."""
        end_s = self._copies.next_end_s()
        if shape != StepShape(0, 0) or end_s is None:
            return shape.seconds
        return min(max(end_s - self._clock(), 0.0), STEP_BASE_SECONDS)
