"""`fastserve top`, from expositions."""

import io

import pytest
from rich.console import Console

from fastserve_vllm.commands.scrape import Change, NotServedError, parse, read
from fastserve_vllm.commands.top import view

ENGINE = 'model_name="m",engine="0"'
BEFORE = f"""\
# TYPE vllm:fastserve_jobs gauge
vllm:fastserve_jobs{{{ENGINE},state="running"}} 4.0
vllm:fastserve_jobs{{{ENGINE},state="paused"}} 7.0
# TYPE vllm:fastserve_batch_limit gauge
vllm:fastserve_batch_limit{{{ENGINE}}} 6.0
# TYPE vllm:fastserve_level_jobs gauge
vllm:fastserve_level_jobs{{{ENGINE},level="0"}} 3.0
vllm:fastserve_level_jobs{{{ENGINE},level="10"}} 8.0
# TYPE vllm:fastserve_longest_wait_seconds gauge
vllm:fastserve_longest_wait_seconds{{{ENGINE},level="0"}} 0.25
vllm:fastserve_longest_wait_seconds{{{ENGINE},level="10"}} 9.5
# TYPE vllm:fastserve_started counter
vllm:fastserve_started_total{{{ENGINE}}} 100.0
# TYPE vllm:fastserve_step_seconds histogram
vllm:fastserve_step_seconds_bucket{{{ENGINE},le="+Inf"}} 10.0
vllm:fastserve_step_seconds_count{{{ENGINE}}} 10.0
vllm:fastserve_step_seconds_sum{{{ENGINE}}} 1.0
# TYPE vllm:fastserve_copy_wait_seconds counter
vllm:fastserve_copy_wait_seconds_total{{{ENGINE}}} 0.0
"""
AFTER = (
    BEFORE.replace(f"started_total{{{ENGINE}}} 100.0", f"started_total{{{ENGINE}}} 150.0")
    .replace(f"seconds_count{{{ENGINE}}} 10.0", f"seconds_count{{{ENGINE}}} 30.0")
    .replace(f"seconds_sum{{{ENGINE}}} 1.0", f"seconds_sum{{{ENGINE}}} 2.6")
    .replace(f"wait_seconds_total{{{ENGINE}}} 0.0", f"wait_seconds_total{{{ENGINE}}} 0.4")
)


@pytest.fixture
def change():
    """Two seconds of a server's life."""
    return Change(parse(BEFORE, 10.0), parse(AFTER, 12.0))


def test_rates(change):
    """Increase a second; 0 for a server that began anew."""
    assert change.rate("started") == 25.0
    assert change.rate("step_seconds", "_count") == 10.0
    assert Change(change.now, change.before).rate("started") == 0.0


def test_view(change):
    """Who waits, for how long and at which level; what steps take."""
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(view(change))
    text = console.export_text()
    for words in (
        "running 4 of 6",
        "waiting 7, 9.5 s at most",
        "80.0 ms a step",
        "25.0%",
        "9.50 s",
    ):
        assert words in text
    lines = text.splitlines()
    level = [i for i, line in enumerate(lines) if line.lstrip().startswith(("0 ", "10 "))]
    assert len(level) == 2, "levels in the order of their numbers"


def test_no_server():
    """One line instead of a traceback."""
    with pytest.raises(NotServedError, match="does not answer"):
        read("http://127.0.0.1:9")
    with pytest.raises(NotServedError, match="not an http address"):
        read("file:///etc/passwd")
