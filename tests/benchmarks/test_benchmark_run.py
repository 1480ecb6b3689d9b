"""The command: what it plans, what it finds again, and what it refuses."""

from __future__ import annotations

import json
import os
import threading

import pytest

from benchmarks import in_process, manifest, report, run, store
from benchmarks.alone import VIRTUAL
from benchmarks.cli import experiment_of, parse_arguments
from benchmarks.regimes import REGIMES, kv_demand, short_kv_blocks
from benchmarks.result import RunResult
from benchmarks.systems import SYSTEMS, check_runnable, system_named
from benchmarks.workload import TraceRow
from fastserve_vllm.config import FastServeConfig


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.csv"
    rows = "".join(f"{20 + n},{10 + n}\n" for n in range(30))
    path.write_text(f"prompt_tokens,output_tokens\n{rows}", encoding="utf-8")
    return path


def result_of(plan):
    """What measuring gives, without measuring."""
    return RunResult(
        plan.system.name,
        plan.load,
        plan.seed,
        plan.rate_rps,
        {"requests_per_s": 10.0, "normalized_ms": {"mean": 2.0}},
        "digest",
        {"000000": "01234567"},
        alone=VIRTUAL,
    )


@pytest.fixture
def measured(monkeypatch):
    """Stands in for measuring; collects the plans."""
    plans = []

    def each(task, arguments, jobs, preloaded):
        assert task is in_process.run_point
        for plan in arguments:
            plans.append(plan)
            yield result_of(plan)

    monkeypatch.setattr(run, "each_in_fresh_process", each)
    return plans


def command(trace, tmp_path, tiny_model, *more):
    out = str(tmp_path / "out")
    return ["--trace", str(trace), "--out", out, "--requests", "9", "--model", tiny_model, *more]


def test_capacity_comes_first_and_systems_rotate(trace, tmp_path, tiny_model, measured):
    """Load by load within a seed; another system begins at each seed."""
    arguments = ("--loads", "0.5", "1.5", "--seeds", "3", "4")
    assert run.main(command(trace, tmp_path, tiny_model, *arguments)) == 0
    stock, ours = "vllm-fcfs", "fastserve"
    assert [(p.seed, p.load, p.system.name) for p in measured] == [
        *((3, None, stock), (3, 0.5, stock), (3, 0.5, ours), (3, 1.5, stock), (3, 1.5, ours)),
        *((4, None, stock), (4, 0.5, ours), (4, 0.5, stock), (4, 1.5, ours), (4, 1.5, stock)),
    ]
    assert [p.rate_rps for p in measured[:3]] == [None, 5.0, 5.0]
    assert measured[1].requests == measured[2].requests


def test_points_are_found_again(trace, tmp_path, tiny_model, measured):
    """A second run measures only what is missing."""
    run.main(command(trace, tmp_path, tiny_model, "--loads", "0.5", "--seeds", "0"))
    del measured[:]
    run.main(command(trace, tmp_path, tiny_model, "--loads", "0.5", "1.5", "--seeds", "0"))
    assert [(p.load, p.system.name) for p in measured] == [(1.5, "vllm-fcfs"), (1.5, "fastserve")]


def test_other_configurations_do_not_mix(trace, tmp_path, tiny_model, measured, capsys):
    """A folder holds one experiment; the message names what differs."""
    once = command(trace, tmp_path, tiny_model, "--all-at-once", "--seeds", "0")
    assert run.main(once) == 0
    assert run.main([*once, "--batch", "8"]) == 2
    error = capsys.readouterr().err
    assert "config.engine.max_num_seqs" in error
    assert "--overwrite" in error
    assert run.main([*once, "--batch", "8", "--overwrite"]) == 0


def test_points_of_other_code_are_measured_again(
    trace, tmp_path, tiny_model, measured, monkeypatch, capsys
):
    """What was measured before the package changed is not this package's; nor are they mixed."""
    once = command(trace, tmp_path, tiny_model, "--all-at-once", "--seeds", "0")
    run.main(once)
    monkeypatch.setattr(store, "code_fingerprint", lambda: "changed")
    monkeypatch.setattr(manifest, "code_fingerprint", lambda: "changed")
    del measured[:]
    run.main([*once, "--systems", "vllm-fcfs"])
    assert [p.system.name for p in measured] == ["vllm-fcfs"]
    assert report.main([str(tmp_path / "out")]) == 2
    assert "differ in code" in capsys.readouterr().err


def test_points_are_whole(trace, tmp_path, tiny_model, measured, capsys):
    """Every point says how it was measured, and the tables can be had from the folder alone."""
    run.main(command(trace, tmp_path, tiny_model, "--all-at-once", "--seeds", "0"))
    out = tmp_path / "out"
    names = sorted(path.name for path in out.iterdir())
    assert names == ["fastserve_all-at-once_seed0.json", "vllm-fcfs_all-at-once_seed0.json"]
    point = json.loads((out / names[0]).read_text(encoding="utf-8"))
    assert point["manifest"]["config"]["clock"] == "virtual"
    assert point["request_digests"] == "01234567"
    tables = capsys.readouterr().out
    assert report.main([str(out)]) == 0
    assert capsys.readouterr().out == tables
    assert report.main([str(out), "--baseline", "mlfq"]) == 2


@pytest.fixture
def beside(monkeypatch):
    """Stands in for measuring over HTTP: ends once two points run; collects who ran on which cores.

    A process's own cores are those of its main thread, which no point changes.
    """
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    met, seen = threading.Barrier(2, timeout=20), []

    def point(plan, folder):
        met.wait()
        seen.append((plan.load, plan.system.name, os.sched_getaffinity(0), folder))
        return result_of(plan)

    monkeypatch.setattr(run.over_http, "run_point", point)
    return seen


def test_side_by_side(trace, tmp_path, tiny_model, beside):
    """Systems run at the same time on cores of their own, and take turns with them."""
    own = os.sched_getaffinity(0)
    more = ("--http", "--side-by-side", "--loads", "0.5", "--seeds", "0", "1")
    assert run.main(command(trace, tmp_path, tiny_model, *more)) == 0
    pairs = [beside[i : i + 2] for i in range(0, len(beside), 2)]
    for (_, _, cores, folder), (_, _, others, another) in pairs:
        assert cores
        assert others
        assert not cores & others
        assert folder != another
    # The baseline beside itself is the capacity, then come the two systems, for each seed.
    stock, ours = "vllm-fcfs", "fastserve"
    expected = [(None, {stock}), (0.5, {stock, ours})] * 2
    assert [(pair[0][0], {name for _, name, *_ in pair}) for pair in pairs] == expected
    first, second = ({name: cores for _, name, cores, _ in pairs[i]} for i in (1, 3))
    assert (first[stock], first[ours]) == (second[ours], second[stock])
    assert os.sched_getaffinity(0) == own


def test_side_by_side_is_measured_whole(trace, tmp_path, tiny_model, beside):
    """Of a pair of which one point is missing, both are measured again."""
    words = command(trace, tmp_path, tiny_model, "--http", "--side-by-side", "--loads", "1")
    words += ["--seeds", "0"]
    assert run.main(words) == 0
    (tmp_path / "out" / "fastserve_load1_seed0.json").unlink()
    del beside[:]
    assert run.main(words) == 0
    assert sorted(name for _, name, *_ in beside) == ["fastserve", "vllm-fcfs"]
    del beside[:]
    assert run.main(words) == 0
    assert beside == []


def test_side_by_side_wants_a_core_for_each(trace, tmp_path, tiny_model, monkeypatch, capsys):
    """It says how many there are."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    more = ("--http", "--side-by-side", "--loads", "1")
    assert run.main(command(trace, tmp_path, tiny_model, *more)) == 2
    assert "2 systems need as many cores, got 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--loads", "0"], "must be a number above 0"),
        (["--loads", "nan"], "must be a number above 0"),
        (["--requests", "0"], "must be a whole number above 0"),
        (["--clock", "virtual", "--http"], "wall"),
        (["--clock", "wall", "--jobs", "2"], "one at a time"),
        (["--loads", "1", "--all-at-once"], "exclude each other"),
        (["--loads", "1", "--side-by-side"], "--http with --loads"),
        (["--all-at-once", "--http", "--side-by-side"], "--http with --loads"),
        (["--pace", "4"], "--pace is for --http"),
        (["--http", "--pace", "0"], "must be a number above 0"),
        (["--engine-args", "[1]"], "a JSON object"),
    ],
)
def test_senseless_arguments_are_refused(trace, tmp_path, tiny_model, more, message, capsys):
    """With status 2 and a line that says what is accepted."""
    with pytest.raises(SystemExit) as ended:
        run.main(command(trace, tmp_path, tiny_model, *more))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--systems", "fifo"], "unknown system 'fifo'; known are vllm-fcfs"),
        (["--systems", "srpt-oracle", "--http"], "in process only"),
        (["--fastserve-config", '{"levels": 3}'], "fastserve: fastserve_config.levels"),
        (["--requests", "31"], "cannot take 31 requests from 30 rows"),
        (["--trace-arrivals"], "carries no arrivals"),
        (["--kv-blocks", "3"], "cannot hold one longest request"),
        (["--model", "/nowhere"], "not a model folder"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    trace, tmp_path, tiny_model, measured, more, message, capsys
):
    """With status 2 and one line."""
    assert run.main(command(trace, tmp_path, tiny_model, *more)) == 2
    assert message in capsys.readouterr().err
    assert measured == []


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "one of the arguments --workload --trace is required"),
        (["--workload", "alpaca", "--trace", "t.csv"], "not allowed with"),
        (["--workload", "sharedgpt"], "choose from"),
        (["--workload", "alpaca", "--scale-prompts", "0"], "must be a number above 0"),
    ],
)
def test_lengths_come_from_one_place(tmp_path, lengths, message, capsys):
    """A built-in workload or a trace, not both."""
    with pytest.raises(SystemExit):
        parse_arguments([*lengths, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_a_malformed_trace_is_named_by_the_command(tmp_path, tiny_model, measured, capsys):
    """File, line and column, with status 2."""
    trace = tmp_path / "bad.csv"
    trace.write_text("prompt_tokens,output_tokens\n5,5\nx,5\n", encoding="utf-8")
    assert run.main(command(trace, tmp_path, tiny_model)) == 2
    assert "bad.csv, line 3: prompt_tokens must be" in capsys.readouterr().err
    trace.write_text("prompt_tokens\n5\n", encoding="utf-8")
    assert run.main(command(trace, tmp_path, tiny_model)) == 2
    assert "bad.csv needs one of the columns output_tokens" in capsys.readouterr().err


def test_built_in_lengths_need_no_file(tmp_path, tiny_model):
    """The points say which ones they were, and how they were scaled."""
    words = ["--workload", "alpaca", "--scale-outputs", "2", "--requests", "50"]
    words += ["--model", tiny_model, "--out", str(tmp_path)]
    experiment = experiment_of(parse_arguments(words))
    assert experiment.config["trace"] == {"built_in": "alpaca"}
    assert experiment.config["scale"] == {"prompts": 1.0, "outputs": 2.0}
    assert all(r.output_tokens % 2 == 0 for r in experiment.workloads[0])


def test_regimes_fill_in_what_is_not_given(trace, tmp_path, tiny_model):
    """Batch, loads and KV blocks; what is given stays."""
    base = command(trace, tmp_path, tiny_model)
    idle = parse_arguments([*base, "--regime", "idle", "--batch", "4"])
    assert (idle.batch, idle.loads) == (4, [0.3])
    short = experiment_of(parse_arguments([*base, "--regime", "kv"]))
    assert short.shape.batch == REGIMES["kv"].batch
    # Requests this short want less than a fifth of what one longest request does.
    assert short.shape.kv_blocks == 65
    ample = experiment_of(parse_arguments(base))
    assert ample.shape.kv_blocks > short.shape.kv_blocks


def test_kv_demand_is_a_full_batch_at_full_length():
    """64 requests of 2.5 blocks on average; a fifth of them are left."""
    rows = [TraceRow(33, 31), TraceRow(60, 20)]
    assert kv_demand(rows, batch=64, block_size=32) == 160
    assert short_kv_blocks(0.2, 160, block_size=32, max_model_len=256) == 32


def test_every_system_of_ours_has_a_valid_configuration():
    """Whatever a system asks of FastServe is a key that it knows."""
    for system in SYSTEMS.values():
        if system.fastserve is not None:
            FastServeConfig.parse(system.fastserve)


def test_offloading_needs_a_device():
    """Elsewhere the message says why it cannot be compared."""
    system = system_named("vllm-fcfs+offload")
    with pytest.raises(ValueError, match="does not run on this platform"):
        check_runnable(system, http=False, is_cuda_alike=lambda: False)
    check_runnable(system, http=True, is_cuda_alike=lambda: True)
    assert system.serve_arguments() == ["--kv-offloading-size", "4.0"]


def test_systems_over_http_are_flags():
    """FastServe is selected as a user selects it."""
    flags = system_named("fastserve-reactive").serve_arguments()
    assert flags[:2] == ["--scheduler", "fastserve"]
    assert json.loads(flags[3]) == {"swap_mode": "reactive"}


def test_further_configuration_is_for_fastserve_alone():
    """It does not override what makes a system that system."""
    further = {"swap_mode": "reactive", "num_levels": 4}
    assert system_named("vllm-fcfs").configured(further) is system_named("vllm-fcfs")
    assert system_named("fastserve-recompute").configured(further).fastserve == {
        "swap_mode": "recompute",
        "num_levels": 4,
    }


def test_only_a_priority_oracle_is_fed_with_lengths():
    """The others do not know how long an answer will be."""
    from benchmarks.workload import Request

    request = Request("0", 0.0, 5, 77)
    priorities = {name: system.priority_of(request) for name, system in SYSTEMS.items()}
    assert {name for name, priority in priorities.items() if priority} == {"vllm-priority-oracle"}
