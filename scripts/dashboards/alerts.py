"""Prometheus' alert rules and scrape configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scripts.dashboards.queries import ENGINE_LABELS, metric, samples

_PER_ENGINE = f"by ({', '.join(ENGINE_LABELS)})"


@dataclass(frozen=True)
class Alert:
    """One rule.

    Attributes:
        name: in Prometheus; docs/operating.md has a section of that name.
        expr: true series fire.
        lasting: for how long they must be true.
        severity: `warning` or `critical`.
        says: one sentence; Prometheus fills in labels and value.
    """

    name: str
    expr: str
    lasting: str
    severity: str
    says: str

    def rule(self) -> dict[str, Any]:
        """As Prometheus reads it."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasting,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": f"{self.says} (engine {{{{ $labels.engine }}}})",
                "runbook": f"docs/operating.md#{self.name.lower()}",
            },
        }


def _now(name: str, where: str = "", merge: str = "max") -> str:
    return f"{merge} {_PER_ENGINE} ({samples(metric(name), where=where, selector='')})"


def _rate(name: str, suffix: str = "", where: str = "") -> str:
    return f"sum {_PER_ENGINE} (rate({samples(metric(name), suffix, where, '')}[5m]))"


_LEFT = 'use=~"free|reclaimable"'
_STEPPING = _rate("step_seconds", "_sum")

ALERTS: tuple[Alert, ...] = (
    Alert(
        "FastServeStarvation",
        f"{_now('longest_wait_seconds')} > 5 * {_now('starvation_limit_seconds')}",
        "1m",
        "warning",
        "A request has waited for {{ $value | humanizeDuration }}, over five starvation limits",
    ),
    Alert(
        "FastServeThrash",
        f"{_rate('swapped_out')} / {_rate('started')} > 0.5",
        "5m",
        "warning",
        "KV cache leaves the device {{ $value | humanize }} times for each turn",
    ),
    Alert(
        "FastServeRecomputing",
        f"{_rate('recomputed_tokens')} / {_rate('batch_tokens')} > 0.2",
        "5m",
        "warning",
        "{{ $value | humanizePercentage }} of the computed tokens are computed again",
    ),
    Alert(
        "FastServeHostPoolFull",
        f"{_now('host_blocks', where=_LEFT, merge='sum')} / "
        f"{_now('host_blocks', merge='sum')} < 0.05",
        "2m",
        "warning",
        "{{ $value | humanizePercentage }} of the host's swap space is left",
    ),
    Alert(
        "FastServeCopiesStall",
        f"{_rate('copy_wait_seconds')} / {_STEPPING} > 0.1",
        "5m",
        "warning",
        "Steps stand still for KV copies for {{ $value | humanizePercentage }} of their time",
    ),
    Alert(
        "FastServeCopiesFail",
        f"increase({samples(metric('copies_failed'), selector='')}[10m]) > 0",
        "0m",
        "critical",
        "{{ $value }} KV copies failed; their requests compute again",
    ),
    Alert(
        "FastServeStepModelOff",
        f"abs({_rate('predicted_step_seconds')} / {_STEPPING} - 1) > 0.5",
        "10m",
        "warning",
        "Predicted step time is off by {{ $value | humanizePercentage }}",
    ),
)


def rules() -> dict[str, Any]:
    """The rule file."""
    return {"groups": [{"name": "fastserve", "rules": [alert.rule() for alert in ALERTS]}]}


def scrape_config() -> dict[str, Any]:
    """Prometheus' configuration for one server on this machine."""
    return {
        "global": {"scrape_interval": "5s", "evaluation_interval": "15s"},
        "rule_files": ["alerts.yml"],
        "scrape_configs": [
            {"job_name": "vllm", "static_configs": [{"targets": ["localhost:8000"]}]}
        ],
    }
