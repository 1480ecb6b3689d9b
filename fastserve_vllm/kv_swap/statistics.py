"""Carries the catalogue's figures through vLLM's connector statistics to Prometheus."""

import math
from itertools import product
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from fastserve_vllm.metrics import BY_NAME, CATALOGUE, Kind, Metric


class FastServeStats(KVConnectorStats):
    """A report, as `fastserve_vllm.metrics` describes it."""

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add the other's counters and observations; take the other's gauges, which are newer."""
        for metric in CATALOGUE:
            if metric.name in other.data:
                self.data[metric.name] = metric.merge(
                    self.data.get(metric.name), other.data[metric.name]
                )
        return self

    def reduce(self) -> dict[str, int | float]:
        """What moved, for vLLM's periodic log line: totals, and a histogram's mean."""
        figures = {name: _total(BY_NAME[name], value) for name, value in self.data.items()}
        return {name: round(figure, 6) for name, figure in figures.items() if figure}


def _total(metric: Metric, figure: Any) -> float:
    parts = [part for _, part in metric.series(figure)]
    if metric.kind is not Kind.HISTOGRAM:
        return sum(parts)
    buckets = [bucket for part in parts for bucket in part.values()]
    times = sum(count for count, _ in buckets)
    return sum(value for _, value in buckets) / times if times else 0.0


class FastServePromMetrics(KVConnectorPromMetrics):
    """One Prometheus metric for each entry of the catalogue, with vLLM's own engine labels."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kinds = {
            Kind.COUNTER: metric_types[Counter],
            Kind.GAUGE: metric_types[Gauge],
            Kind.HISTOGRAM: metric_types[Histogram],
        }
        self._metrics = {}
        self._children: dict[tuple[str, int, str], Any] = {}
        for metric in CATALOGUE:
            extra: dict[str, Any] = {}
            if metric.kind is Kind.GAUGE:
                # The value is the engine's, whichever API server process last reported it.
                extra["multiprocess_mode"] = "mostrecent"
            elif metric.kind is Kind.HISTOGRAM:
                extra["buckets"] = list(metric.buckets)
            self._metrics[metric.name] = kinds[metric.kind](
                name=metric.prometheus_name,
                documentation=f"{metric.help} Unit: {metric.unit}.",
                labelnames=[*labelnames, *metric.label_names],
                **extra,
            )
            if metric.kind is Kind.COUNTER:
                self._start_at_zero(metric)

    def _start_at_zero(self, metric: Metric) -> None:
        """Let series exist from the start: a rate misses what one jumps to when it appears.

        Those of levels, and of two labels, come with the first report.
        """
        series = [[]] if not metric.labels else [[value] for value in metric.labels[0].values]
        if len(metric.labels) < 2:
            for engine_idx, labels in product(self.per_engine_labelvalues, series):
                self._child(metric.name, engine_idx, labels)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record one report of one engine."""
        for name, figure in transfer_stats_data.items():
            metric = BY_NAME[name]
            for labels, part in metric.series(figure):
                _record(metric, self._child(name, engine_idx, labels), part)

    def _child(self, name: str, engine_idx: int, labels: list[str]) -> Any:
        key = (name, engine_idx, ",".join(labels))
        child = self._children.get(key)
        if child is None:
            values = [*self.per_engine_labelvalues[engine_idx], *labels]
            child = self._children[key] = self._metrics[name].labels(*values)
        return child


def _record(metric: Metric, child: Any, figure: Any) -> None:
    if metric.kind is Kind.COUNTER:
        child.inc(figure)
    elif metric.kind is Kind.GAUGE:
        child.set(figure)
    else:
        bounds = (*metric.buckets, math.inf)
        for bucket, (times, total) in figure.items():
            # The mean lies in the bucket, but for rounding, and the sum stays right.
            mean = min(total / times, bounds[bucket])
            for _ in range(times):
                child.observe(mean)
