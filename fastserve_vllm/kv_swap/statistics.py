"""Carries the catalogue's figures through vLLM's connector statistics to Prometheus."""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from fastserve_vllm.metrics import CATALOGUE, Kind


class FastServeStats(KVConnectorStats):
    """Figures by metric name: counters since the last report, gauges as they are.

    A labelled metric maps its label's value to a figure.
    """

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add the other's counters; take the other's gauges, which are newer."""
        for metric in CATALOGUE:
            if metric.name in other.data:
                self.data[metric.name] = metric.merge(
                    self.data.get(metric.name), other.data[metric.name]
                )
        return self

    def reduce(self) -> dict[str, int | float]:
        """Totals for vLLM's periodic log line, to the microsecond."""
        return {
            name: round(sum(value.values()) if isinstance(value, dict) else value, 6)
            for name, value in self.data.items()
        }


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
        kinds = {Kind.COUNTER: metric_types[Counter], Kind.GAUGE: metric_types[Gauge]}
        self._metrics = {}
        for metric in CATALOGUE:
            labels = [*labelnames, metric.label] if metric.label else labelnames
            # A gauge's value is the engine's, whichever API server process last reported it.
            extra = {"multiprocess_mode": "mostrecent"} if metric.kind is Kind.GAUGE else {}
            self._metrics[metric.name] = kinds[metric.kind](
                name=metric.prometheus_name, documentation=metric.help, labelnames=labels, **extra
            )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Record one report of one engine."""
        labels = self.per_engine_labelvalues[engine_idx]
        for metric in CATALOGUE:
            if metric.name not in transfer_stats_data:
                continue
            value = transfer_stats_data[metric.name]
            series = value if isinstance(value, dict) else {None: value}
            for label, figure in series.items():
                values = labels if label is None else [*labels, label]
                child = self._metrics[metric.name].labels(*values)
                child.inc(figure) if metric.kind is Kind.COUNTER else child.set(figure)
