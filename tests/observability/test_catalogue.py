"""The catalogue, and the files that are generated from it."""

import re

import pytest

from fastserve_vllm.metrics import (
    BY_NAME,
    CATALOGUE,
    PREEMPTION_CAUSES,
    PREEMPTION_MODES,
    PREEMPTIONS,
    Distribution,
    Kind,
    Metric,
)
from scripts.dashboards import files
from scripts.dashboards.alerts import ALERTS
from scripts.dashboards.panels import ROWS
from scripts.dashboards.queries import quantile, rate, value

GENERATED = files.generated_files()
PANELS = [panel for row in ROWS for panel in row.panels]


class TestDistribution:
    """Observations by bucket."""

    def test_bounds_are_inclusive(self):
        """A value goes to the first bucket whose bound it does not exceed."""
        distribution = Distribution((1.0, 2.0))
        for observed in (0.5, 1.0, 1.5, 2.0, 9.0):
            distribution.observe(observed)
        assert distribution.take() == {0: (2, 1.5), 1: (2, 3.5), 2: (1, 9.0)}

    def test_taking_forgets(self):
        """What was taken is not reported again."""
        distribution = Distribution((1.0,))
        distribution.observe(0.5)
        distribution.take()
        assert distribution.take() == {}


MERGES = {
    "counter": ("started", 2, 3, 5),
    "gauge": ("batch_limit", 2, 3, 3),
    "labelled counter": (
        "declined",
        {"tokens": 1},
        {"tokens": 2, "memory": 4},
        {"tokens": 3, "memory": 4},
    ),
    "histogram": (
        "step_seconds",
        {0: (1, 0.5)},
        {0: (2, 1.0), 3: (1, 9.0)},
        {0: (3, 1.5), 3: (1, 9.0)},
    ),
    "labelled histogram": (
        "queue_wait_seconds",
        {"0": {1: (1, 0.5)}},
        {"0": {1: (1, 0.5)}, "2": {0: (1, 0.1)}},
        {"0": {1: (2, 1.0)}, "2": {0: (1, 0.1)}},
    ),
}


@pytest.mark.parametrize("case", MERGES.values(), ids=MERGES)
def test_merge(case):
    """Counters and observations of two reports add up; of a gauge the newer one counts."""
    name, older, newer, merged = case
    assert BY_NAME[name].merge(older, newer) == merged
    assert BY_NAME[name].merge(None, newer) == newer


@pytest.mark.parametrize("metric", CATALOGUE, ids=BY_NAME)
def test_entry_is_complete(metric: Metric):
    """Names are Prometheus', seconds and bytes are in the name, histograms alone have buckets."""
    assert re.fullmatch(r"[a-z_]+", metric.name)
    assert metric.help.endswith(".")
    assert metric.unit not in ("seconds", "bytes") or metric.unit in metric.name
    assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
    assert list(metric.buckets) == sorted(set(metric.buckets))


def test_preemptions_name_their_labels():
    """Every pair of mode and cause that occurs is made of the labels' values."""
    assert {mode for mode, _ in (p.split(",") for p in PREEMPTIONS)} == set(PREEMPTION_MODES)
    assert {cause for _, cause in (p.split(",") for p in PREEMPTIONS)} == set(PREEMPTION_CAUSES)


@pytest.mark.parametrize("path", GENERATED)
def test_generated_file_is_current(path):
    """`make dashboards` would change nothing."""
    assert (files.ROOT / path).read_text() == GENERATED[path]


def test_every_metric_is_on_the_dashboard():
    """Nothing is exported that the dashboard hides."""
    shown = " ".join(query.expr for panel in PANELS for query in panel.queries)
    assert [m.name for m in CATALOGUE if m.prometheus_name not in shown] == []


def test_titles_are_unique():
    """A panel can be named by its title."""
    titles = [panel.title for panel in PANELS]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_alert_has_its_section(alert):
    """docs/operating.md says what the alert means and which knob answers it."""
    page = (files.ROOT / "docs/operating.md").read_text()
    assert f"### {alert.name}\n" in page


UNKNOWN = {
    "name": lambda: value("no_such_metric"),
    "label": lambda: rate("started", "level"),
    "kind": lambda: rate("jobs"),
    "histogram": lambda: quantile(0.5, "started"),
}


@pytest.mark.parametrize("build", UNKNOWN.values(), ids=UNKNOWN)
def test_query_of_the_unknown_raises(build):
    """A dashboard cannot be built on what the catalogue lacks."""
    with pytest.raises((KeyError, ValueError)):
        build()
