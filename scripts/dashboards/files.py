"""Every generated file and its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from scripts.dashboards.alerts import rules, scrape_config
from scripts.dashboards.grafana import dashboard_json, provisioning
from scripts.dashboards.metrics_page import metrics_page

ROOT = Path(__file__).resolve().parent.parent.parent
_NOTE = "# Written by `make dashboards` from fastserve_vllm/metrics.py and scripts/dashboards.\n"


def generated_files() -> dict[str, str]:
    """Texts by path below the checkout."""
    grafana = "examples/grafana"
    texts = {
        "docs/metrics.md": metrics_page(),
        f"{grafana}/dashboard.json": dashboard_json(),
        f"{grafana}/alerts.yml": _yaml(rules()),
        f"{grafana}/prometheus.yml": _yaml(scrape_config()),
    }
    for path, content in provisioning().items():
        texts[f"{grafana}/provisioning/{path}"] = _yaml(content)
    return texts


def _yaml(content: dict[str, Any]) -> str:
    return _NOTE + yaml.safe_dump(content, sort_keys=False, width=100)
