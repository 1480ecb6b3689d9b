"""Steps that last as long as they are told to, with the next one scheduled meanwhile."""

import json
import subprocess
import sys

import pytest

from benchmarks.pace import Pace, held_up_share, read_report
from benchmarks.plugins import plugin_environment
from benchmarks.virtual_clock import StepShape, VirtualClock

STEP = StepShape(prefill_tokens=0, decodes=1)
PROMPT, TOKENS, TIMES = 50, 12, 8
IN_VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256,
          kv_cache_memory_bytes=1 << 26, block_size=32)
core = llm.llm_engine.engine_core.engine_core
greedy = SamplingParams(temperature=0, ignore_eos=True, max_tokens=int(sys.argv[3]))
prompt = [{"prompt_token_ids": list(range(10, 10 + int(sys.argv[2])))}]
pace = getattr(core.model_executor.driver_worker.worker, "_pace", None)
began_s = time.perf_counter()
(output,) = llm.generate(prompt, greedy, use_tqdm=False)
print(json.dumps({
    "platform": type(current_platform).__name__,
    "async": llm.llm_engine.vllm_config.scheduler_config.async_scheduling,
    "took_s": time.perf_counter() - began_s,
    "computed_s": pace and pace.computed_s,
    "tokens": list(output.outputs[0].token_ids),
}))
"""


@pytest.fixture
def clock():
    return VirtualClock()


@pytest.fixture
def pace(clock):
    """Of a device twice as slow as the virtual clock says; to sleep is to let its time pass."""
    return Pace(2, clock)


def test_a_step_waits_for_the_one_before(pace, clock):
    """Handed over together, one ends after the other, and nothing was held up."""
    first, second = pace.begin(STEP), pace.begin(STEP)
    assert first == pytest.approx(2 * STEP.seconds)
    assert second == pytest.approx(2 * first)
    pace.take(first)
    assert clock() == pytest.approx(first)
    pace.take(second)
    assert clock() == pytest.approx(second)
    assert pace.computed_s == pytest.approx(second)
    assert pace.held_up_s == 0


def test_an_idle_device_begins_at_once(pace, clock):
    """Time without work is nobody's fault."""
    pace.take(pace.begin(STEP))
    clock.advance(5)
    began_s = clock()
    assert pace.begin(STEP) == pytest.approx(began_s + 2 * STEP.seconds)
    assert pace.held_up_s == 0


def test_a_machine_too_slow_is_noticed(pace, clock):
    """Both a step that is handed over late and an output that is not there in time."""
    first = pace.begin(STEP)
    clock.advance(first + 1)
    second = pace.begin(STEP)
    assert second == pytest.approx(first + 1 + 2 * STEP.seconds)
    assert pace.held_up_s == pytest.approx(1)
    pace.take(first)
    assert pace.held_up_s == pytest.approx(2)
    assert clock() == pytest.approx(first + 1)
    pace.take(second)
    assert pace.held_up_s == pytest.approx(2)


def test_a_running_server_reports(tmp_path, clock):
    """About every second, for whoever reads it meanwhile; a new server begins without a report."""
    pace = Pace(1, clock, tmp_path / "pace.json")
    assert held_up_share(read_report(tmp_path)) == {}
    pace.take(pace.begin(STEP))
    assert read_report(tmp_path) == {}
    end_s = pace.begin(STEP)
    clock.advance_to(end_s + 1)
    pace.take(end_s)
    second = pace.begin(STEP)
    clock.advance_to(second)
    pace.take(second)
    found = read_report(tmp_path)
    assert found == {"computed_s": pytest.approx(3 * STEP.seconds), "held_up_s": pytest.approx(1)}
    assert held_up_share(found)["pace_held_up_share"] == pytest.approx(1 / (3 * STEP.seconds))
    assert held_up_share(dict.fromkeys(found, 0.0)) == {}
    plugin_environment(tmp_path, TIMES)
    assert read_report(tmp_path) == {}


def generated(model, env, folder):
    """What `IN_VLLM` prints."""
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM, str(model), str(PROMPT), str(TOKENS)],
        env=env | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.host_versions
def test_an_engine_keeps_the_pace(tmp_path, tiny_model, subprocess_env):
    """A prefill and the decodes take as long as the virtual clock says, times the pace, at least;
    they are scheduled asynchronously, and their tokens are those of the stock platform.
    """
    stock = generated(tiny_model, subprocess_env, tmp_path)
    paced = generated(tiny_model, subprocess_env | plugin_environment(tmp_path, TIMES), tmp_path)
    assert stock["platform"] == "CpuPlatform"
    assert paced["platform"] == "PacedPlatform"
    assert paced["async"]
    steps_s = StepShape(PROMPT, 0).seconds + (TOKENS - 1) * STEP.seconds
    assert paced["computed_s"] == pytest.approx(TIMES * steps_s)
    assert paced["took_s"] >= paced["computed_s"]
    assert paced["tokens"] == stock["tokens"]
