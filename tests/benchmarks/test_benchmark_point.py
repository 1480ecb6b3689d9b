"""One point on a real engine, in a process as `benchmarks.run` starts them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from benchmarks import in_process
from benchmarks.engine import EngineShape, fewest_kv_blocks
from benchmarks.plan import Plan
from benchmarks.processes import each_in_fresh_process
from benchmarks.systems import system_named
from benchmarks.workload import Request


def test_a_point_is_measured_whole(tiny_model):
    """The same one twice to the byte; swaps appear in its timeline, and nothing is held after."""
    shape = EngineShape(
        Path(tiny_model), 8, fewest_kv_blocks(32, 512), max_model_len=512, max_batched_tokens=512
    )
    requests = tuple(Request(f"{n:06d}", 0.05 * n, 40 + n, 150) for n in range(16))
    plan = Plan(system_named("fastserve"), shape, requests, seed=0, clock="virtual", load=1.0)
    once, again = each_in_fresh_process(in_process.run_point, [plan, plan], 1, preloaded=True)
    assert once.figures == again.figures
    assert once.timeline == again.timeline
    assert once.output_digest == again.output_digest
    assert max(once.timeline["blocks_out"]) > 0
    assert max(once.timeline["device_blocks"]) <= shape.kv_blocks - 1
    assert once.timeline["requests"][-1] == once.timeline["device_blocks"][-1] == 0
    assert all(earlier <= later for earlier, later in pairwise(once.timeline["time_s"]))
    assert len(once.figures["quantiles"]["longest_gap_ms"]) == 101
