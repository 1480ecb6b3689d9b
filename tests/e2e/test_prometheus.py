"""The dashboard and the alerts against a live server, by a real Prometheus."""

import math
import re
import time
from collections import Counter

import pytest
from click.testing import CliRunner
from serving import free_port, serving

from fastserve_vllm.commands import main
from fastserve_vllm.metrics import CATALOGUE, Kind
from fastserve_vllm.trace.reading import read_trace
from scripts.dashboards.alerts import ALERTS
from scripts.dashboards.live import Load, binary, running_prometheus
from scripts.dashboards.panels import ROWS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        binary() is None, reason="Prometheus is not installed: apt-get install prometheus"
    ),
]
PANELS = [panel for row in ROWS for panel in row.panels]
CLIENTS = 24


@pytest.fixture(scope="module")
def starved(tiny_model, subprocess_env, tmp_path_factory):
    """A server whose device holds three long requests, behind two API server processes."""
    folder = tmp_path_factory.mktemp("starved")
    flags = ["--scheduler", "fastserve", "--max-num-seqs", "6", "--num-gpu-blocks-override", "40"]
    flags += [
        "--api-server-count",
        "2",
        "--fastserve-config.trace_file",
        str(folder / "trace.jsonl"),
    ]
    with serving(tiny_model, flags, subprocess_env, folder / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def watched(starved, tmp_path_factory):
    """(Prometheus, load) after twelve seconds of load, which goes on."""
    folder = tmp_path_factory.mktemp("prometheus")
    target = starved.url.removeprefix("http://")
    load = Load(starved.url, starved.model, CLIENTS, (200, 200))
    with running_prometheus(target, folder, free_port()) as prometheus:
        load.start()
        time.sleep(12)
        yield prometheus, load
        load.stop()


def filled_in(expr):
    """A panel's query as Grafana sends it."""
    return (
        expr.replace("$model_name", ".*")
        .replace("$engine", ".*")
        .replace("$__rate_interval", "10s")
    )


@pytest.mark.parametrize("panel", PANELS, ids=[panel.title for panel in PANELS])
def test_panel_has_data(panel, watched):
    """Every query of every panel finds numbers while the server swaps under load."""
    prometheus, load = watched
    for query in panel.queries:
        values = [float(series["value"][1]) for series in prometheus.query(filled_in(query.expr))]
        assert any(math.isfinite(value) for value in values), (query.expr, load.errors[:3])


def test_every_metric_is_scraped(watched):
    """Prometheus knows exactly the names that the catalogue defines."""
    prometheus, _ = watched
    names = set(prometheus.get("label/__name__/values"))
    scraped = {name for name in names if name.startswith("vllm:fastserve_")}
    suffixes = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count", "_created"), Kind.GAUGE: ("",)}
    known = {
        m.prometheus_name + suffix
        for m in CATALOGUE
        for suffix in suffixes.get(m.kind, ("_total", "_created"))
    }
    assert scraped <= known
    assert {
        m.sample_name if m.kind is not Kind.HISTOGRAM else m.sample_name + "_count"
        for m in CATALOGUE
    } <= scraped


def test_rules_are_evaluated(watched):
    """Prometheus evaluates every alert without an error, on metrics that exist."""
    prometheus, _ = watched
    scraped = set(prometheus.get("label/__name__/values"))
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == [alert.name for alert in ALERTS]
    for rule in rules:
        assert rule["health"] == "ok", rule
        assert set(re.findall(r"vllm:\w+", rule["query"])) <= scraped


def test_swaps_are_visible(watched):
    """Under this load KV cache moves both ways, and requests lose their places."""
    prometheus, _ = watched
    for name in ("swapped_out", "swapped_in", "preemptions", "demotions"):
        assert float(prometheus.query(f"sum(vllm:fastserve_{name}_total)")[0]["value"][1]) > 0, name


def test_top_shows_the_server(starved, watched):
    """`fastserve top` reads a live server: its batch, its queue, its memory."""
    arguments = ["top", "--url", starved.url, "--once", "--interval", "1"]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert re.search(r"running \d of 6 +waiting \d+", result.output)
    assert re.search(r"device +[█·]+ \d+% +of 39", result.output)
    assert re.search(r"\d ms a step", result.output)


def test_nothing_is_counted_twice(starved, watched):
    """Two API server processes: each request is counted once, whichever got the report."""
    _, load = watched
    load.stop()
    assert load.errors == []
    starved.wait_for("vllm:num_requests_running", "vllm:num_requests_waiting")
    totals = Counter()
    for (name, *_), value in starved.metrics().items():
        totals[name] += value
    assert totals["vllm:request_success_total"] == load.served > CLIENTS
    assert totals["vllm:fastserve_joins_total"] == load.served
    turns_cut_short = totals["vllm:fastserve_preemptions_total"]
    assert totals["vllm:fastserve_started_total"] - turns_cut_short == load.served
    assert (
        totals["vllm:fastserve_step_seconds_count"] == totals["vllm:fastserve_batch_requests_count"]
    )
    assert totals["vllm:fastserve_batch_tokens_total"] >= totals["vllm:generation_tokens_total"]
    assert totals["vllm:fastserve_jobs"] == 0
    trace = read_trace(starved.log.parent / "trace.jsonl")
    assert len(trace.stories) == load.served
    assert len({trace.find(name).request_id for name in load.ids}) == load.served
    assert {story.outcome for story in trace.stories.values()} == {"finished_length_capped"}
