"""The catalogue of every exported figure. Prometheus metrics are built from it."""

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Kind(Enum):
    """How a figure behaves in Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported figure.

    Attributes:
        name: its name inside a report.
        kind: counter (reports carry increments) or gauge (reports carry the value).
        help: what it says, with its unit.
        label: the label that splits it, if any; its values come from a bounded set.
    """

    name: str
    kind: Kind
    help: str
    label: str | None = None

    @property
    def prometheus_name(self) -> str:
        """With vLLM's prefix, so that vLLM unregisters it with its own."""
        return f"vllm:fastserve_{self.name}"

    def merge(self, older: Any, newer: Any) -> Any:
        """One report's value after another's."""
        if self.kind is Kind.GAUGE or older is None:
            return newer
        if self.label is None:
            return older + newer
        return {key: older.get(key, 0) + newer.get(key, 0) for key in {*older, *newer}}


CATALOGUE: tuple[Metric, ...] = (
    Metric("jobs", Kind.GAUGE, "Live requests by scheduling state.", "state"),
    Metric("level_jobs", Kind.GAUGE, "Live requests by queue level, 0 the highest.", "level"),
    Metric("base_quantum_seconds", Kind.GAUGE, "Service seconds of the highest level."),
    Metric("started", Kind.COUNTER, "Requests that entered the batch, resumptions included."),
    Metric("paused", Kind.COUNTER, "Preemptions that kept the KV cache on the device."),
    Metric("recomputed", Kind.COUNTER, "Preemptions that gave up the KV cache."),
    Metric("spilled", Kind.COUNTER, "Preemptions that moved KV cache while the step waited."),
    Metric("swapped_out", Kind.COUNTER, "Requests whose KV cache moved to the host."),
    Metric("swapped_in", Kind.COUNTER, "Requests whose KV cache moved back to the device."),
    Metric("saved", Kind.COUNTER, "Copies of full blocks to the host in advance."),
    Metric("copied_bytes", Kind.COUNTER, "Bytes of KV cache copied, by all workers.", "direction"),
    Metric("copy_wait_seconds", Kind.COUNTER, "Seconds that steps stood still for KV copies."),
    Metric("copies_failed", Kind.COUNTER, "KV copies that failed; their requests recompute."),
    Metric("copy_bytes_per_second", Kind.GAUGE, "Measured copy bandwidth of a worker."),
    Metric("host_blocks", Kind.GAUGE, "Host blocks of the swap space by use.", "use"),
    Metric("demotions", Kind.COUNTER, "Requests moved down a level, their quantum used up."),
    Metric("promotions", Kind.COUNTER, "Requests moved to the highest level after starving."),
    Metric("skip_joins", Kind.COUNTER, "Requests that joined below the highest level."),
    Metric("declined", Kind.COUNTER, "Batch places declined for want of a resource.", "reason"),
    Metric("steps", Kind.COUNTER, "Engine steps that computed something."),
    Metric("step_seconds", Kind.COUNTER, "Seconds that those steps took."),
    Metric("predicted_step_seconds", Kind.COUNTER, "Seconds that the step-time model predicted."),
    Metric("scheduler_seconds", Kind.COUNTER, "Seconds spent on FastServe's own scheduling."),
)
