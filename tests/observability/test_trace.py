"""Trace files: what is written, what is read back, and what the commands say."""

import json

import pytest
from click.testing import CliRunner

from fastserve_vllm.commands import SUBCOMMANDS, main
from fastserve_vllm.config import ConfigError
from fastserve_vllm.testing import ModelFreeEngine, vllm_config
from fastserve_vllm.trace.chrome import chrome_trace
from fastserve_vllm.trace.explain import facts, shares
from fastserve_vllm.trace.reading import TraceError, read_trace
from fastserve_vllm.trace.trace_file import BACKUPS, Event, TraceFile

LIFE = [
    (0.0, "queued", 0, "arrived", 0),
    (1.0, "running", 0, "turn", 20),
    (2.0, "running", 0, "prompt computed", 0),
    (2.5, "running", 1, "quantum used up", 0),
    (4.0, "paused", 1, "others first", 0),
    (5.0, "swapping_out", 1, "leaves for others", 0),
    (5.5, "swapped", 1, "copied to the host", 0),
    (7.0, "swapping_in", 1, "turn is near", 0),
    (7.5, "paused", 1, "copied to the device", 0),
    (8.0, "running", 1, "turn", 0),
    (9.0, "queued", 1, "memory short, given up", 0),
    (10.0, "running", 1, "turn", 40),
    (11.0, "running", 1, "prompt computed", 0),
    (12.0, "finished", 1, "finished_stopped", 0),
]
SECONDS = {
    "queued": 2.0,
    "prefill": 1.0,
    "decode": 4.0,
    "recompute": 1.0,
    "paused": 1.5,
    "swapping_out": 0.5,
    "swapped": 1.5,
    "swapping_in": 0.5,
}


def events(request_id="cmpl-1-a", life=LIFE):
    return [
        Event(at_s, step, request_id, state, level, reason, 3, tokens)
        for step, (at_s, state, level, reason, tokens) in enumerate(life)
    ]


def write(path, *lives, **kwargs):
    trace = TraceFile(str(path), {"policy": "fastserve"}, **kwargs)
    for life in lives:
        for event in life:
            trace.add(event)
    trace.close()
    return path


@pytest.fixture
def path(tmp_path):
    """A trace of two requests."""
    other = events("cmpl-2-b", LIFE[:3])
    return write(tmp_path / "trace.jsonl", events(), other)


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class TestReading:
    """A request's story."""

    def test_time_by_activity(self, path):
        """Every second is told, as what the request did in it."""
        story = read_trace(path).find("cmpl-1-a")
        assert {name: s for name, s in story.seconds().items() if s} == SECONDS
        assert sum(SECONDS.values()) == story.end_s - story.arrival_s == 12.0
        assert story.first_token_s == 2.0
        assert story.outcome == "finished_stopped"

    def test_unfinished(self, path):
        """A request that lives on is told up to the last event of the trace."""
        story = read_trace(path).find("cmpl-2")
        assert story.outcome is None
        assert story.seconds()["decode"] == 10.0

    def test_find(self, path):
        """Part of an id will do unless it is in several; what is in none is refused."""
        trace = read_trace(path)
        with pytest.raises(TraceError, match="2 requests"):
            trace.find("cmpl")
        with pytest.raises(TraceError, match="no request 'x'"):
            trace.find("x")

    def test_not_a_trace(self, tmp_path):
        """Another file is refused, and the line named."""
        other = tmp_path / "other"
        other.write_text("hello\n")
        with pytest.raises(TraceError, match="other:1 is not a line of a trace"):
            read_trace(other)

    def test_last_run_counts(self, path):
        """A server that was started again appends; what it appended is read."""
        write(path, events("cmpl-3-c"))
        assert list(read_trace(path).stories) == ["cmpl-3-c"]


class TestFile:
    """What is on disk."""

    def test_rotates_and_stays_bounded(self, tmp_path):
        """Old files go, every file begins with the header, the newest events are there."""
        path, limit = tmp_path / "trace.jsonl", 4000
        trace = TraceFile(str(path), {"policy": "fastserve"}, max_bytes=limit)
        for number in range(400):
            trace.add(Event(number, number, f"r{number}", "queued", 0, "arrived", 0))
            trace.flush()
        trace.close()
        files = sorted(tmp_path.iterdir())
        assert len(files) == BACKUPS + 1
        for file in files:
            assert file.stat().st_size <= limit
            assert json.loads(file.read_text().splitlines()[0])["policy"] == "fastserve"
        stories = read_trace(path).stories
        assert list(stories)[-1] == "r399"
        assert len(stories) > 100, "the older files are read, too"

    def test_ids_are_escaped(self, tmp_path):
        """Clients choose ids."""
        path = write(tmp_path / "t", events('say "hi"\n', LIFE[:2]))
        assert list(read_trace(path).stories) == ['say "hi"\n']

    def test_unwritable_stops_the_start(self, tiny_model, tmp_path):
        """With a message that names the field."""
        (tmp_path / "file").touch()
        config = vllm_config(tiny_model, {"trace_file": str(tmp_path / "file" / "t")})
        with pytest.raises(ConfigError, match=r"fastserve_config\.trace_file"):
            ModelFreeEngine(config)

    def test_engines_write_files_of_their_own(self, tiny_model, tmp_path):
        """Those of a dense model are told their number, and a data-parallel size of one."""
        for engine in (0, 1):
            config = vllm_config(tiny_model, {"trace_file": str(tmp_path / "t.jsonl")})
            config.parallel_config.data_parallel_index = engine
            ModelFreeEngine(config).scheduler.shutdown()
        assert {p.name for p in tmp_path.iterdir()} == {"t.jsonl", "t.engine1.jsonl"}

    def test_off_by_default(self, tiny_model):
        """Without the key the planner is the plain one."""
        planner = ModelFreeEngine(vllm_config(tiny_model, {})).scheduler.planner
        assert type(planner).__name__ == "StepPlanner"


class TestCommands:
    """`fastserve explain` and `fastserve timeline`."""

    def test_explain(self, path):
        """Where the time went, why turns ended, and every span where asked."""
        result = run("explain", "cmpl-1", path, "--spans")
        assert result.exit_code == 0, result.output
        for words in (
            "after 2.000 s",
            "finished_stopped",
            "33.3%",
            "1 x others first",
            "recompute",
        ):
            assert words in result.output

    def test_waits(self, path):
        """The longest wait reaches from the end of a turn to the next one."""
        known = dict(facts(read_trace(path).find("cmpl-1")))
        assert known["longest wait for a turn"] == "4.000 s"
        assert known["turns"] == "3"
        assert known["entry level"] == "0"
        assert known["lowest level"] == "1"

    def test_shares_add_up(self, path):
        """They are shares of the whole time."""
        assert sum(row[2] for row in shares(read_trace(path).find("cmpl-1"))) == pytest.approx(1)

    def test_explain_of_nobody(self, path):
        """One line, status 1."""
        result = run("explain", "nobody", path)
        assert result.exit_code == 1
        assert result.output == "Error: no request 'nobody' in this trace\n"

    def test_timeline(self, path, tmp_path):
        """The page holds both traces and loads nothing from elsewhere."""
        page = tmp_path / "page.html"
        assert run("timeline", path, path, "-o", page).exit_code == 0
        text = page.read_text()
        data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
        assert [len(trace["rows"]) for trace in data["traces"]] == [2, 2]
        assert "http://" not in text
        assert "https://" not in text

    def test_chrome(self, path, tmp_path):
        """Complete events in microseconds, a thread a request."""
        out = tmp_path / "chrome.json"
        assert run("timeline", path, "--chrome", out).exit_code == 0
        found = json.loads(out.read_text())["traceEvents"]
        assert found == chrome_trace(read_trace(path))["traceEvents"]
        first = next(event for event in found if event["ph"] == "X")
        assert (first["name"], first["ts"], first["dur"]) == ("queued", 0, 1_000_000)
        assert sum(e["dur"] for e in found if e["ph"] == "X" and e["tid"] == 1) == 12_000_000

    def test_timeline_into_nothing(self, path):
        """Says what is missing."""
        assert "-o PAGE.html" in run("timeline", path).output

    def test_every_subcommand_loads(self):
        """The list of subcommands is the list of modules."""
        for name in SUBCOMMANDS:
            assert run(name, "--help").exit_code == 0
