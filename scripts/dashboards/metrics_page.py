"""docs/metrics.md, from the catalogue."""

from __future__ import annotations

from fastserve_vllm.metrics import SECTIONS, Kind, Metric

_HEAD = """\
# Metrics

<!-- Written by `make dashboards` from fastserve_vllm/metrics.py. -->

On vLLM's own `/metrics`, with its labels `model_name` and `engine` and those named here. Figures
are gathered at most five times a second, and once more when the engine runs dry. A counter's name
ends in `_total`; a histogram has `_bucket`, `_sum` and `_count`. With several API server processes
each report reaches exactly one of them, and `/metrics` of any shows the sum.
"""


def metrics_page() -> str:
    """The page."""
    parts = [_HEAD]
    for title, metrics in SECTIONS.items():
        parts += [f"\n## {title}\n\n", _table(metrics)]
    return "".join(parts)


def _table(metrics: tuple[Metric, ...]) -> str:
    rows = ["| metric | kind | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| `{metric.sample_name}` | {metric.kind.value} | {metric.unit} | {_labels(metric)} | "
        f"{metric.help}{_bounds(metric)} |"
        for metric in metrics
    ]
    return "\n".join(rows) + "\n"


def _labels(metric: Metric) -> str:
    return "; ".join(f"`{label.name}`: {label.describe()}" for label in metric.labels)


def _bounds(metric: Metric) -> str:
    if metric.kind is not Kind.HISTOGRAM:
        return ""
    return f" Buckets up to {', '.join(f'{bound:g}' for bound in metric.buckets)}."
