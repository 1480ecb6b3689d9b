"""The simulated engine: leaps change nothing, same seed same bytes, blocks are conserved."""

import dataclasses
import gc
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastserve_vllm
from fastserve_vllm.config import POLICY_NAMES, FastServeConfig
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.step_time import StepTimeModel, save_profile
from fastserve_vllm.simulator.engine import SimulatedEngine
from fastserve_vllm.simulator.kv_cache import LiveRequest
from fastserve_vllm.simulator.served import ServedRequest
from fastserve_vllm.simulator.shape import EngineShape
from fastserve_vllm.traces import Request

MODES = ("recompute", "reactive", "proactive")
# Seconds per step, prefill token, decode and context token.
COEFFICIENTS = (5e-3, 3e-5, 3e-5, 1e-8)
SLOTS = {"device_blocks": 4000}
# About three long requests fit.
KV = {"device_blocks": 120}


def make_shape(**changes: object) -> EngineShape:
    shape = {
        "batch_limit": 8,
        "token_budget": 256,
        "device_blocks": 4000,
        "block_tokens": 16,
        "host_blocks": 1000,
        "step_time": StepTimeModel(COEFFICIENTS, pinned=True),
        "block_copy_s": 2e-4,
    }
    return EngineShape(**(shape | changes))


def trace(seed: int, count: int, *, gap_s: float = 0.05) -> list[Request]:
    """Requests of ShareGPT's order of magnitude, more than the engine can serve at once."""
    dice = random.Random(seed)
    requests, now_s = [], 0.0
    for number in range(count):
        now_s += dice.expovariate(1 / gap_s)
        prompt = min(int(dice.lognormvariate(4.5, 1.0)) + 1, 900)
        output = min(int(dice.lognormvariate(4.0, 1.0)) + 1, 500)
        requests.append(Request(f"{number}", now_s, prompt, output))
    return requests


def serve(requests, shape: EngineShape, **options: object) -> list[ServedRequest]:
    leap = options.pop("leap", True)
    engine = SimulatedEngine(shape, FastServeConfig.parse(options), leap=leap)
    return list(engine.serve(requests))


def figures(served: list[ServedRequest]) -> dict[str, tuple[float, ...]]:
    return {
        one.request.id: (one.first_token_s, one.last_token_s, one.longest_gap_s) for one in served
    }


@pytest.fixture
def profile(tmp_path) -> str:
    """The path of a profile that says what steps really take."""
    path = str(tmp_path / "profile.json")
    save_profile(StepTimeModel(COEFFICIENTS, base_quantum_s=0.006), path)
    return path


class TestLeaps:
    """Steps that nothing happens between may be taken at once."""

    def check(self, seed: int, regime: dict[str, int], **options: object) -> None:
        requests, shape = trace(seed, 80), make_shape(**regime)
        leapt = figures(serve(requests, shape, leap=True, **options))
        stepped = figures(serve(requests, shape, leap=False, **options))
        assert leapt.keys() == stepped.keys()
        assert len(leapt) == len(requests)
        for name, expected in stepped.items():
            assert leapt[name] == pytest.approx(expected, rel=0, abs=1e-9), name

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize(
        ("policy", "objective"),
        [
            *[(policy, "balanced") for policy in POLICY_NAMES],
            *[(policy, name) for policy in ("fastserve", "mlfq") for name in ("smooth", "paper")],
        ],
    )
    def test_they_change_nothing_where_places_are_short(self, seed, policy, objective):
        """Every policy and objective; memory is ample."""
        self.check(seed, SLOTS, policy=policy, objective=objective, base_quantum_s=0.006)

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("policy", POLICY_NAMES)
    @pytest.mark.parametrize("mode", MODES)
    def test_they_change_nothing_where_memory_is_short(self, seed, policy, mode, profile):
        """Every policy and swap mode; what a recomputation costs is known, not learned.

        A leap is one observation for the learned step times, so what is learned differs by a hair.
        """
        self.check(seed, KV, policy=policy, swap_mode=mode, step_time_profile=profile)

    def test_there_are_some(self):
        """A run with leaps takes fewer decisions than steps, by far."""
        plans = {}
        for leap in (True, False):
            engine = SimulatedEngine(make_shape(**SLOTS), FastServeConfig(), leap=leap)
            plan, counted = engine.planner.plan, []
            engine.planner.plan = lambda *args, plan=plan, counted=counted: (
                counted.append(1) or plan(*args)
            )
            list(engine.serve(trace(1, 60, gap_s=0.4)))
            plans[leap] = len(counted)
        assert plans[True] < plans[False] / 3


def outputs_elsewhere(program: str) -> set[bytes]:
    """What the program prints in processes whose hashes have different seeds."""
    return {
        subprocess.run(
            [sys.executable, "-c", program],
            check=True,
            capture_output=True,
            cwd=Path(fastserve_vllm.__file__).parents[1],
            env={"PYTHONHASHSEED": hash_seed},
        ).stdout
        for hash_seed in ("0", "1")
    }


class TestSameBytes:
    """I7."""

    PROGRAM = """
import json, sys
sys.path.insert(0, {here!r})
from test_simulator import KV, figures, make_shape, serve, trace
print(json.dumps(figures(serve(trace(3, 60), make_shape(**KV), swap_mode={mode!r}))))
"""

    @pytest.mark.parametrize("mode", MODES)
    def test_another_process_gives_the_same_bytes(self, mode):
        """Whatever the seed of its hashes is, and whatever is in its memory."""
        program = self.PROGRAM.format(here=str(Path(__file__).parent), mode=mode)
        here = json.dumps(figures(serve(trace(3, 60), make_shape(**KV), swap_mode=mode)))
        assert outputs_elsewhere(program) == {(here + "\n").encode()}


class TestConservation:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("host_blocks", [0, 40, 1000])
    def test_every_block_has_one_owner(self, seed, mode, host_blocks):
        """I1 and I4 after every step, on a device and a host of any size; all finish."""
        shape = make_shape(device_blocks=95, host_blocks=host_blocks)
        engine = SimulatedEngine(shape, FastServeConfig(swap_mode=mode), leap=False)
        step, checked = engine._step, []

        def step_and_check(arrival_s: float) -> list[ServedRequest]:
            served = step(arrival_s)
            engine.check_integrity()
            checked.append(1)
            return served

        engine._step = step_and_check
        requests = trace(seed, 40)
        assert len(list(engine.serve(requests))) == len(requests)
        assert len(checked) > 500
        assert engine.kv.device.count == shape.device_blocks
        moved = engine.planner.counters
        assert moved.recomputed + moved.spilled + moved.swapped_out > 0

    def test_figures_of_a_request_are_in_order(self):
        """Arrival, first token, last token; and a gap is no longer than they are apart."""
        for one in serve(trace(5, 80), make_shape(**KV)):
            assert one.request.arrival_s < one.first_token_s <= one.last_token_s
            assert 0 <= one.longest_gap_s <= one.last_token_s - one.first_token_s + 1e-9
            assert (one.longest_gap_s == 0) == (one.request.output_tokens == 1)
            assert one.normalized_s == pytest.approx(one.e2e_s / one.request.output_tokens)

    @pytest.mark.parametrize("leap", [True, False])
    def test_every_gap_is_told(self, leap):
        """One for each token but the first of each request, and together as long as the answers."""
        gaps = []
        requests = trace(6, 40)
        engine = SimulatedEngine(
            make_shape(),
            FastServeConfig(),
            on_gap=lambda gap_s, times: gaps.append((gap_s, times)),
            leap=leap,
        )
        served = list(engine.serve(requests))
        assert sum(times for _, times in gaps) == sum(r.output_tokens - 1 for r in requests)
        spans = sum(one.last_token_s - one.first_token_s for one in served)
        assert sum(gap_s * times for gap_s, times in gaps) == pytest.approx(spans)


def test_a_request_alone_takes_what_its_steps_take():
    """By hand: one prefill step, then one decode step a token, each a little longer."""
    step_s, prefill_s, decode_s, context_s = COEFFICIENTS
    (one,) = serve([Request("a", 2.0, 100, 4)], make_shape())
    first_s = 2.0 + step_s + 100 * prefill_s
    decodes = [step_s + decode_s + context * context_s for context in (100, 101, 102)]
    assert one.first_token_s == pytest.approx(first_s, abs=1e-12)
    assert one.last_token_s == pytest.approx(first_s + sum(decodes), abs=1e-12)
    assert one.longest_gap_s == pytest.approx(decodes[-1], abs=1e-12)


class TestMemory:
    def live_objects(self, requests: int) -> int:
        """Jobs, requests and tuples that are there once a long run has come to its end.

        The engine idles now and then, so that what is live at the end does not depend on how long
        the run was.
        """

        def arrivals() -> Iterator[Request]:
            dice = random.Random(7)
            for number in range(requests):
                yield Request(f"{number}", 0.05 * number, 40, dice.randint(1, 8))

        engine = SimulatedEngine(make_shape(**KV), FastServeConfig())
        served = 0
        for _ in engine.serve(arrivals()):
            served += 1
        assert served == requests
        gc.collect()
        kinds = (Job, LiveRequest, Request, ServedRequest)
        mine = [
            found
            for found in gc.get_objects()
            if isinstance(found, kinds) or (type(found) is tuple and len(found) > 3)
        ]
        del engine
        return len(mine)

    def test_it_does_not_grow_with_finished_requests(self):
        """Ten times the requests leave no more behind."""
        self.live_objects(10)
        few, many = self.live_objects(300), self.live_objects(3000)
        assert many <= few + 300


class TestRefused:
    def test_a_request_that_can_never_fit(self):
        """It would wait for ever: the message names it and both sizes."""
        requests = [Request("big", 0.0, 300, 21)]
        with pytest.raises(ValueError, match="request big needs 21 KV blocks, the device has 20"):
            serve(requests, make_shape(device_blocks=20))

    def test_one_that_just_fits(self):
        """It takes the whole device."""
        requests = [Request("big", 0.0, 300, 20)]
        assert len(serve(requests, make_shape(device_blocks=20))) == 1

    def test_arrivals_out_of_order(self):
        """A trace is sorted by arrival."""
        requests = [Request("a", 1.0, 5, 5), Request("b", 0.5, 5, 5)]
        with pytest.raises(ValueError, match="request b arrives out of order"):
            serve(requests, make_shape())

    def test_an_answer_of_nothing(self):
        """A prompt and an answer have a token at least."""
        with pytest.raises(ValueError, match="request a: prompt_tokens and output_tokens must be"):
            Request("a", 0.0, 5, 0)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("batch_limit", 0),
            ("token_budget", 0),
            ("device_blocks", 0),
            ("block_tokens", 0),
            ("host_blocks", -1),
            ("block_copy_s", -1.0),
            ("block_copy_s", float("nan")),
            ("block_copy_s", float("inf")),
        ],
    )
    def test_an_impossible_engine(self, field, value):
        """The message names the field."""
        with pytest.raises(ValueError, match=f"^{field} must be"):
            dataclasses.replace(make_shape(), **{field: value})
