"""A server's own counters, read from its `/metrics`."""

from __future__ import annotations

import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_FASTSERVE = "vllm:fastserve_"
_RENAMED = {"vllm:num_preemptions": "vllm_preemptions"}
# Labels that every metric of vLLM's carries; one server has one value of each.
_COMMON_LABELS = {"engine", "model_name"}


def read_counters(base_url: str) -> dict[str, Any]:
    """FastServe's counters and vLLM's preemptions so far."""
    with urllib.request.urlopen(f"{base_url}/metrics", timeout=30) as response:
        return counters_of(response.read().decode())


def counters_of(text: str) -> dict[str, Any]:
    """The same of an exposition's text: by name, and by label value where there is a label."""
    counters: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        if family.name not in _RENAMED and not family.name.startswith(_FASTSERVE):
            continue
        name = _RENAMED.get(family.name, family.name.removeprefix(_FASTSERVE))
        for sample in family.samples:
            if sample.name.endswith("_total"):
                _add(counters, name, sample.labels, sample.value)
    return counters


def _add(counters: dict[str, Any], name: str, labels: dict[str, str], value: float) -> None:
    own = [text for label, text in labels.items() if label not in _COMMON_LABELS]
    if own:
        counters = counters.setdefault(name, {})
        name = ", ".join(own)
    counters[name] = counters.get(name, 0.0) + value
