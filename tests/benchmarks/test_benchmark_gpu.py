"""The accelerator's benchmark, as far as it goes without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cli, copy_bandwidth, gpu
from benchmarks.copy_bandwidth import CopyCase, CopyPlan, block_ids, cases, figures, table
from benchmarks.llama_8b import BLOCK_BYTES, CONFIG, write_model
from fastserve_vllm.kv_swap.copies import SynchronousCopies

ROOT = Path(__file__).resolve().parents[2]
SECONDS = {"plain": [0.1, 0.2, 0.4], "engine": [0.25], "by_torch": [0.8], "submit": [0.002]}


def arguments(tmp_path, *more):
    return gpu.parse_arguments(["--out", str(tmp_path / "out"), *more])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_it_says_so(tmp_path):
    """In one line, with a status of its own, and without leaving anything behind."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == gpu.NO_ACCELERATOR == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("no accelerator: torch ")
    assert not list(tmp_path.iterdir())


def test_the_model_is_of_8b_shape(tmp_path):
    """128 KiB of KV a token; the configuration is all that its folder holds."""
    folder = write_model(tmp_path / "model")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == CONFIG
    assert BLOCK_BYTES == 16 * 128 * 1024


@pytest.mark.parametrize("part", ["slots", "kv"])
def test_parts_are_commands_of_the_other_benchmark(part, tmp_path):
    """On the wall's clock, and with room for paused requests in the V2 model runner."""
    words = gpu.run_arguments(part, arguments(tmp_path), tmp_path)
    args = cli.parse_arguments(words)
    assert (args.regime, args.clock, args.batch, args.block_size) == (part, "wall", 64, 16)
    assert tuple(args.systems) == gpu.SYSTEMS[part]
    assert tuple(args.loads) == gpu.LOADS[part]
    assert (args.workload, args.trace) == ("sharegpt", None)
    assert args.engine_args["max_num_active_seqs"] == 64
    assert args.engine_args["max_num_seqs"] == 64 + args.requests
    assert args.out == tmp_path / "out" / part


def test_engine_arguments_can_be_replaced(tmp_path):
    """Those that are given win."""
    args = arguments(
        tmp_path, "--engine-args", '{"max_num_seqs": 100}', "--requests", "7", "--trace", "t.csv"
    )
    words = gpu.run_arguments("kv", args, tmp_path)
    parsed = cli.parse_arguments(words)
    assert (parsed.requests, parsed.engine_args["max_num_seqs"]) == (7, 100)
    assert (parsed.workload, parsed.trace) == (None, Path("t.csv"))
    assert parsed.engine_args["load_format"] == "dummy"


@pytest.mark.parametrize(
    "more",
    [
        ("--blocks", "0"),
        ("--blocks", "64", "--pool-blocks", "32"),
        ("--repetitions", "0"),
        ("--engine-args", "[]"),
        ("--only", "idle"),
    ],
)
def test_senseless_arguments_are_refused(more, tmp_path):
    """With status 2."""
    with pytest.raises(SystemExit) as ended:
        arguments(tmp_path, *more)
    assert ended.value.code == 2


def test_a_part_that_fails_does_not_keep_the_next_from_running(tmp_path, monkeypatch, capsys):
    """What was measured is there, and the status tells."""
    ran = []

    def run(command):
        ran.append(command)
        if len(ran) == 1:
            raise RuntimeError("out of memory")
        return 0

    monkeypatch.setattr(gpu.run, "main", run)
    monkeypatch.setattr(gpu, "measure_copies", lambda args: 0)
    assert gpu.measure(arguments(tmp_path), tmp_path) == 1
    assert len(ran) == 2
    printed = capsys.readouterr()
    assert "out of memory" in printed.err
    assert all(f"## {part}" in printed.out for part in gpu.PARTS)


def test_scattered_blocks_are_drawn_once_each():
    """Others on either side and in every turn, the same in every run."""
    case = CopyCase("one row", "out", "scattered", 64)
    device, host = block_ids(case, 256, 1)
    assert len(set(device)) == len(set(host)) == 64
    assert device != host
    assert block_ids(case, 256, 1) == (device, host)
    assert block_ids(case, 256, 2) != (device, host)
    adjacent = CopyCase("one row", "out", "adjacent", 3)
    assert block_ids(adjacent, 256, 1) == ((0, 1, 2), (0, 1, 2))


def test_bandwidth_is_the_median_over_turns():
    """In GB of 10**9 bytes, and over the plain copy's."""
    row = figures(CopyCase("one row", "in", "adjacent", 64), SECONDS)
    size = 64 * BLOCK_BYTES
    assert row["bytes"] == size
    assert row["gb_per_s"]["plain"] == pytest.approx(size / 0.2 / 1e9)
    assert row["over_plain"] == pytest.approx({"engine": 0.8, "by_torch": 0.25})
    assert row["gb_per_s_range"]["plain"] == pytest.approx((size / 0.4 / 1e9, size / 0.1 / 1e9))
    assert row["submit_ms"] == pytest.approx(2.0)
    *_, line = table([row]).splitlines()
    assert line == "| one row | in | 64 | 128 | adjacent | 0.7 | 0.5 | 0.800 | 2.00 | 0.250 |"


def test_every_case_is_measured(monkeypatch):
    """With an engine that runs anywhere in the place of the device's."""
    monkeypatch.setattr(
        "fastserve_vllm.kv_swap.streams.StreamCopies",
        lambda rows, device, batched=True: SynchronousCopies(rows),
    )
    monkeypatch.setattr(copy_bandwidth._Bench, "_time_plain", lambda bench, case: 0.1)
    plan = CopyPlan(blocks=(1, 3), repetitions=2, pool_blocks=4)
    rows = copy_bandwidth.measure(plan, device="cpu")
    assert [(row["layout"], row["blocks"]) for row in rows] == [
        (case.layout, case.blocks) for case in cases(plan)
    ]
    assert len(rows) == 16
    assert all(row["over_plain"]["engine"] > 0 for row in rows)
