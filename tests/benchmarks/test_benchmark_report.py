"""The report: plots, a page that is whole in itself, and what is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest

from benchmarks import report
from benchmarks.alone import VIRTUAL
from benchmarks.metrics import figures_of
from benchmarks.plots import PLOTS
from benchmarks.records import RequestRecord
from benchmarks.result import RunResult
from benchmarks.store import Store, load_points
from benchmarks.timeline import COLUMNS, SAMPLES, Timeline

CONFIG = {
    "clock": "virtual",
    "http": False,
    "trace": {"built_in": "sharegpt"},
    "requests": 3,
    "engine": {"max_num_seqs": 16, "num_gpu_blocks_override": 100},
    "kv_blocks_over_demand": 0.2,
}


def point(system, load, seed=0, slow=1.0):
    records = [
        RequestRecord(str(n), 0.0, 8, n + 2, tuple(slow * (k + 1) for k in range(n + 2)), "x")
        for n in range(3)
    ]
    ramp = [float(n) for n in range(5)]
    return RunResult(
        system,
        load,
        seed,
        load and 10 * load,
        figures_of(records, VIRTUAL),
        "digest",
        {"000000": "01234567"},
        alone=VIRTUAL,
        timeline=dict.fromkeys(COLUMNS, ramp),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Points of two systems at two loads with two seeds."""
    store = Store(tmp_path_factory.mktemp("points") / "kv", CONFIG)
    for seed in (0, 1):
        store.save(point("vllm-fcfs", None, seed))
        for load in (0.5, 1.2):
            store.save(point("vllm-fcfs", load, seed, slow=2.0))
            store.save(point("fastserve", load, seed))
    return store.folder


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """The report of these points."""
    out = tmp_path_factory.mktemp("report")
    assert report.main([str(folder), "--out", str(out)]) == 0
    return out


def test_the_page_is_whole_in_itself(written):
    """Every plot and table is in it, and nothing is fetched."""
    page = (written / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == len(PLOTS)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<td>fastserve</td>" in page
    assert len(page) < 3_000_000


def test_markdown_shows_plots_and_tables(folder, written, capsys):
    """Each plot is a PNG file beside it; the tables are those that are printed."""
    text = (written / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"\]\((.*\.png)\)", text)
    assert pictures == [f"kv-{name}.png" for name in PLOTS]
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    report.main([str(folder)])
    table = next(line for line in capsys.readouterr().out.splitlines() if "fastserve" in line)
    assert table in text
    document = json.loads((written / "report.json").read_text(encoding="utf-8"))["kv"]
    assert document["output_check"]["identical"]


def test_quantiles_and_timeline_survive_the_store(folder):
    """As they were, to five digits."""
    loaded = load_points(folder)[0]
    assert loaded.timeline == point("vllm-fcfs", 1.0).timeline
    quantiles = loaded.figures["quantiles"]
    assert len(quantiles["ttft_ms"]) == 101
    assert quantiles["ttft_ms"][50] == loaded.figures["ttft_ms"]["p50"]


def test_what_no_point_has_is_not_drawn(tmp_path):
    """Without loads there is no latency against rate; without swaps no timeline."""
    runs = [point("vllm-fcfs", None)]
    drawn = {name for name, (_, plot) in PLOTS.items() if plot(runs) is not None}
    assert drawn == {"slowdown", "throughput"}


def test_bad_folders_are_named(folder, tmp_path, capsys):
    """With status 2 and one line."""
    assert report.main([str(tmp_path / "none")]) == 2
    assert "holds no measured points" in capsys.readouterr().err
    assert report.main([str(folder), "--baseline", "mlfq"]) == 2
    assert "there are points of fastserve, vllm-fcfs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([str(folder), str(folder)])


def stock_scheduler():
    pool = SimpleNamespace(num_gpu_blocks=11, get_num_free_blocks=lambda: 4)
    return SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool), requests={"a": 1})


@pytest.mark.parametrize("steps", [1, SAMPLES, 2 * SAMPLES, 100 * SAMPLES + 7])
def test_a_timeline_is_bounded_and_even(steps):
    """However many steps: at most twice `SAMPLES`, at equal distances but for the last step."""
    timeline = Timeline(stock_scheduler())
    for step in range(1, steps + 1):
        timeline.sample(float(step))
    times = timeline.columns()["time_s"]
    assert len(times) <= 2 * SAMPLES
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(set(gaps[:-1])) <= 1
    assert gaps == sorted(gaps, reverse=True)
    assert times[-1] == steps


def test_a_timeline_counts_blocks_in_use():
    """Without the null block; stock vLLM has none on the host."""
    timeline = Timeline(stock_scheduler())
    timeline.sample(0.5)
    row = {name: column[0] for name, column in timeline.columns().items()}
    assert row == {
        "time_s": 0.5,
        "requests": 1,
        "device_blocks": 6,
        "host_blocks": 0,
        "blocks_out": 0,
        "blocks_in": 0,
    }
