"""The catalogue of every exported figure. Prometheus metrics, dashboard and docs are built from it.

What crosses between processes is a report, a mapping of metric names to figures: a counter's
increase, a gauge's value, a histogram's new observations as `Buckets`. A metric with labels maps
the values of its labels, joined by commas, to figures.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fastserve_vllm.policy.job import JobState


class Kind(Enum):
    """How a figure behaves in Prometheus."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


Buckets = dict[int, tuple[int, float]]
"""Observations and their sum by number of the bucket; the last bucket has no upper bound."""


class Distribution:
    """Observations since they were last taken.

    Args:
        bounds: upper bounds of the buckets, inclusive, rising.
    """

    __slots__ = ("_bounds", "_sums", "_times")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._times = [0] * (len(bounds) + 1)
        self._sums = [0.0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count a value."""
        bucket = bisect_left(self._bounds, value)
        self._times[bucket] += 1
        self._sums[bucket] += value

    def take(self) -> Buckets:
        """What was observed since the last call."""
        seen = zip(self._times, self._sums, strict=True)
        taken = {bucket: pair for bucket, pair in enumerate(seen) if pair[0]}
        for bucket in taken:
            self._times[bucket], self._sums[bucket] = 0, 0.0
        return taken


@dataclass(frozen=True, slots=True)
class Label:
    """What splits a metric.

    Attributes:
        name: in Prometheus.
        values: the values that it can have; empty: numbers.
        numbers: in words, which.
    """

    name: str
    values: tuple[str, ...] = ()
    numbers: str = ""

    def describe(self) -> str:
        """The values in words."""
        return ", ".join(self.values) or self.numbers


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported figure.

    Attributes:
        name: its name inside a report.
        kind: see `Kind`.
        unit: what it counts or measures in.
        help: what it says.
        labels: what splits it; every label's values come from a bounded set.
        buckets: a histogram's upper bounds, without the last, infinite one.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """With vLLM's prefix, so that vLLM unregisters it with its own."""
        return f"vllm:fastserve_{self.name}"

    @property
    def sample_name(self) -> str:
        """As `/metrics` shows it; a histogram's samples add `_bucket`, `_sum` and `_count`."""
        return self.prometheus_name + ("_total" if self.kind is Kind.COUNTER else "")

    @property
    def label_names(self) -> list[str]:
        """Names of its own labels."""
        return [label.name for label in self.labels]

    def series(self, figure: Any) -> Iterable[tuple[list[str], Any]]:
        """The figure's parts, with the values of the labels of each."""
        if not self.labels:
            return [([], figure)]
        return [(key.split(","), part) for key, part in figure.items()]

    def merge(self, older: Any, newer: Any) -> Any:
        """One report's figure after another's."""
        if self.kind is Kind.GAUGE or older is None:
            return newer
        if not self.labels:
            return self._sum(older, newer)
        return {
            key: self._sum(older[key], newer[key])
            if key in older and key in newer
            else older.get(key, newer.get(key))
            for key in {**older, **newer}
        }

    def _sum(self, one: Any, other: Any) -> Any:
        if self.kind is Kind.COUNTER:
            return one + other
        total = dict(one)
        for bucket, (times, value) in other.items():
            before = total.get(bucket, (0, 0.0))
            total[bucket] = (before[0] + times, before[1] + value)
        return total


STATE = Label("state", tuple(state.value for state in JobState))
LEVEL = Label("level", numbers="0 (the highest) to 63")
RANK = Label("rank", numbers="0 to one less than the engine's workers")
DIRECTION = Label("direction", ("out", "in"))
PREEMPTION_MODES = ("paused", "swapped_out", "spilled", "recomputed")
PREEMPTION_CAUSES = ("order", "memory", "host", "copy_failed")
PREEMPTIONS = (
    "paused,order",
    "paused,host",
    "swapped_out,order",
    "swapped_out,memory",
    "spilled,memory",
    "spilled,host",
    "recomputed,order",
    "recomputed,memory",
    "recomputed,host",
    "recomputed,copy_failed",
)
"""The pairs of both that occur."""
PHASES = ("observe", "plan", "apply", "follow", "measure", "copies")

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)

_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

WAITING: tuple[Metric, ...] = (
    Metric("jobs", _G, "requests", "Live requests by scheduling state.", (STATE,)),
    Metric("level_jobs", _G, "requests", "Live requests by queue level.", (LEVEL,)),
    Metric(
        "longest_wait_seconds",
        _G,
        "seconds",
        "Longest current wait for a turn, by queue level; of requests that could run.",
        (LEVEL,),
    ),
    Metric(
        "queue_wait_seconds",
        _H,
        "seconds",
        "Wait for a turn, from arrival or from the end of the turn before, by the level in which "
        "the turn began.",
        (LEVEL,),
        _SECONDS,
    ),
    Metric(
        "joins",
        _C,
        "requests",
        "Requests that joined a queue, by entry level: below the highest through skip-join, in the "
        "last one because first tokens had had their share of the time.",
        (LEVEL,),
    ),
    Metric(
        "demotions",
        _C,
        "requests",
        "Moves down a level, the quantum used up, by the level that was left.",
        (LEVEL,),
    ),
    Metric("promotions", _C, "requests", "Moves to the highest level with absolute ageing."),
    Metric("aged_turns", _C, "requests", "Turns given with relative ageing."),
    Metric(
        "late_turns", _C, "requests", "Those of them that were overdue by the token gap's bound."
    ),
    Metric("quantum_seconds", _G, "seconds", "Quantum of a level; the last has none.", (LEVEL,)),
    Metric(
        "starvation_limit_seconds",
        _G,
        "seconds",
        "Wait after which anybody is raised; absent where nobody is.",
    ),
    Metric(
        "token_gap_limit_seconds",
        _G,
        "seconds",
        "Bound that relative ageing sets to the gap between two tokens; absent without it.",
    ),
    Metric(
        "explained_lengths_ratio",
        _G,
        "ratio",
        "Share of the variance of answers' service that prompts' lengths explain, so far: the last "
        "level relies on them as far. Absent where nothing is learned.",
    ),
)

TURNS: tuple[Metric, ...] = (
    Metric("batch_limit", _G, "requests", "Most requests that a step may run."),
    Metric("started", _C, "requests", "Turns begun: entries into the batch, resumptions included."),
    Metric(
        "preemptions",
        _C,
        "requests",
        "Turns ended early. By what becomes of the KV cache: kept on the device (paused), copied "
        "to the host beside other work (swapped_out) or while the step waits (spilled), or given "
        "up (recomputed). By cause: another was before it in the order, memory was short, vLLM "
        "itself preempted (host), a copy failed.",
        (Label("mode", PREEMPTION_MODES), Label("cause", PREEMPTION_CAUSES)),
    ),
    Metric(
        "declined",
        _C,
        "requests",
        "Batch places declined for want of tokens, adapters or memory, and swap-outs for want of "
        "host memory.",
        (Label("reason", ("tokens", "adapters", "memory", "host_memory")),),
    ),
    Metric(
        "recomputed_tokens",
        _C,
        "tokens",
        "Computed tokens whose KV cache was given up: they are computed again, but for what the "
        "prefix cache still holds then.",
    ),
)

MEMORY: tuple[Metric, ...] = (
    Metric(
        "device_blocks",
        _G,
        "blocks",
        "KV blocks of the device: free, held, or leaving (held until a copy to the host ends).",
        (Label("use", ("free", "held", "leaving")),),
    ),
    Metric(
        "host_blocks",
        _G,
        "blocks",
        "Host blocks of the swap space: free, held by swapped requests, or reclaimable (copies of "
        "blocks that are on the device, too).",
        (Label("use", ("free", "held", "reclaimable")),),
    ),
    Metric("in_flight_blocks", _G, "blocks", "KV blocks being copied now.", (DIRECTION,)),
    Metric(
        "reserve_blocks",
        _G,
        "blocks",
        "Blocks to keep idle, or as good as idle, for bursts of arrivals.",
    ),
    Metric("swapped_out", _C, "requests", "Requests that left the device, all ways together."),
    Metric("swapped_in", _C, "requests", "Requests that came back to the device, likewise."),
    Metric("saved", _C, "requests", "Copies of full blocks to the host in advance."),
    Metric(
        "reused_blocks",
        _C,
        "blocks",
        "Blocks that a swap-out did not copy: the host had them from the request itself (kept) or "
        "from another with the same content (shared).",
        (Label("source", ("kept", "shared")),),
    ),
    Metric(
        "worker_copies",
        _C,
        "copies",
        "KV copies that did not fail, by the rank of the worker in its engine. Each worker copies "
        "its own shard, so those of an engine keep level.",
        (RANK, DIRECTION),
    ),
    Metric("copied_bytes", _C, "bytes", "KV cache copied, by all workers.", (DIRECTION,)),
    Metric("copy_seconds", _C, "seconds", "Time of those copies, by all workers.", (DIRECTION,)),
    Metric("copy_wait_seconds", _C, "seconds", "Time that steps stood still for KV copies."),
    Metric("copies_failed", _C, "copies", "KV copies that failed; their requests recompute."),
    Metric("copy_bytes_per_second", _G, "bytes/s", "Measured copy bandwidth of a worker."),
)

STEPS: tuple[Metric, ...] = (
    Metric("step_seconds", _H, "seconds", "Time of a step that computed something.", (), _SECONDS),
    Metric(
        "predicted_step_seconds", _C, "seconds", "Time that the model predicted for those steps."
    ),
    Metric(
        "prediction_ratio",
        _H,
        "ratio",
        "Predicted over actual time of a step: 1 is right, below 1 too short.",
        (),
        _RATIOS,
    ),
    Metric("batch_requests", _H, "requests", "Requests that a step ran.", (), _SIZES),
    Metric(
        "batch_tokens",
        _C,
        "tokens",
        "Tokens computed: by prefills, recomputation included, and by decodes.",
        (Label("phase", ("prefill", "decode")),),
    ),
    Metric(
        "scheduler_seconds",
        _C,
        "seconds",
        "FastServe's own time, beside vLLM's scheduling: charging and promoting (observe), "
        "choosing (plan), carrying out (apply), following vLLM (follow), the step-time model "
        "(measure), finished copies (copies).",
        (Label("phase", PHASES),),
    ),
)

SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Who waits": WAITING,
    "Turns": TURNS,
    "KV cache": MEMORY,
    "Steps": STEPS,
}
CATALOGUE: tuple[Metric, ...] = tuple(metric for section in SECTIONS.values() for metric in section)
BY_NAME: dict[str, Metric] = {metric.name: metric for metric in CATALOGUE}
