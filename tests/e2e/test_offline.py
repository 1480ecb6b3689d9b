"""`fastserve_vllm.LLM` generates the tokens of `vllm.LLM`, whatever is scarce."""

import json
import re

import pytest
import vllm
from tiny_engine import ENGINE_ARGS, greedy, running, scheduler_of
from vllm import EngineArgs, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.llm_engine import LLMEngine

import fastserve_vllm
from fastserve_vllm import LLM
from fastserve_vllm.config import ConfigError

SCARCE = {
    "slots": {"max_num_seqs": 3},
    "tokens": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
    "memory": {"max_num_seqs": 16, "num_gpu_blocks_override": 24},
    "memory, nothing cached": {
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 24,
        "enable_prefix_caching": False,
    },
    "everything": {
        "max_num_seqs": 5,
        "max_num_batched_tokens": 48,
        "num_gpu_blocks_override": 20,
    },
}


@pytest.mark.host_versions
@pytest.mark.parametrize("scarce", SCARCE.values(), ids=SCARCE.keys())
def test_greedy_tokens_equal_stock(tiny_model, requests, stock_tokens, scarce):
    """I10: preemption at every token changes no token, and leaves nothing behind."""
    config = {"base_quantum_s": 0.002, "starvation_limit_s": 0.2}
    with running(LLM, tiny_model, fastserve_config=config, **scarce) as llm:
        scheduler = scheduler_of(llm)
        assert requests.generate(llm) == stock_tokens
        counters = scheduler.planner.counters
        assert counters.started > len(requests.prompts), "nothing was ever preempted"
        given_up = counters.recomputed + counters.spilled + counters.swapped_out
        assert given_up > 0 or "num_gpu_blocks_override" not in scarce
        assert counters.finished == len(requests.prompts)
        scheduler.check_integrity()
        assert not scheduler.planner.jobs
        assert scheduler.kv_cache_manager.usage == 0


@pytest.mark.parametrize("policy", ["fastserve", "mlfq", "fcfs", "fixed-priority"])
def test_every_policy_generates_the_same(tiny_model, requests, stock_tokens, policy):
    """The order of requests is all that a policy decides."""
    with running(LLM, tiny_model, fastserve_config={"policy": policy}, max_num_seqs=4) as llm:
        assert scheduler_of(llm).fastserve_config.policy == policy
        assert requests.generate(llm) == stock_tokens


def test_selected_engine_arguments_run(tiny_model, requests, stock_tokens):
    """`select` turns any `EngineArgs` into ones that FastServe schedules."""
    args = EngineArgs(tiny_model, max_num_seqs=4, **ENGINE_ARGS)
    assert fastserve_vllm.select(args, {"num_levels": 4}) is args
    engine = LLMEngine.from_engine_args(args)
    try:
        scheduler = engine.engine_core.engine_core.scheduler
        assert scheduler.fastserve_config.num_levels == 4
        for i, (prompt, tokens) in enumerate(
            zip(requests.prompts, requests.max_tokens, strict=True)
        ):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, greedy(tokens))
        outputs = {}
        while engine.has_unfinished_requests():
            outputs |= {int(o.request_id): o.outputs[0].token_ids for o in engine.step()}
        assert [outputs[i] for i in sorted(outputs)] == stock_tokens
    finally:
        engine.engine_core.shutdown()


class TestOneEngine:
    """What users ask of an engine, on one whose two batch places are always contended."""

    @pytest.fixture(scope="class")
    def llm(self, tiny_model):
        config = {"base_quantum_s": 0.002}
        with running(LLM, tiny_model, fastserve_config=config, max_num_seqs=2) as llm:
            yield llm

    @pytest.fixture(autouse=True)
    def _nothing_left(self, llm):
        yield
        scheduler = scheduler_of(llm)
        scheduler.check_integrity()
        assert not scheduler.planner.jobs
        assert scheduler.kv_cache_manager.usage == 0

    def test_json_schema(self, llm):
        """Structured output: every request waits for its grammar, then obeys it."""
        schema = {
            "type": "object",
            "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["age"],
            "additionalProperties": False,
        }
        params = SamplingParams(
            temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(json=schema)
        )
        outputs = llm.generate([f"person {i}" for i in range(6)], params, use_tqdm=False)
        ages = [json.loads(output.outputs[0].text)["age"] for output in outputs]
        assert all(0 <= age <= 99 for age in ages)

    def test_regex_beside_free_text(self, llm):
        """Requests with and without a grammar share the batch."""
        pattern = r"[a-f]{4}-[0-9]{3}"
        constrained = SamplingParams(
            temperature=0,
            max_tokens=20,
            structured_outputs=StructuredOutputsParams(regex=pattern),
        )
        params = [constrained, greedy(30)] * 3
        outputs = llm.generate([f"number {i}" for i in range(6)], params, use_tqdm=False)
        assert all(re.fullmatch(pattern, output.outputs[0].text) for output in outputs[::2])
        assert all(len(output.outputs[0].token_ids) == 30 for output in outputs[1::2])

    def test_parallel_samples(self, llm):
        """All `n` samples of a prompt come back, though each is scheduled by itself."""
        sampled = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
        (output,) = llm.generate(["parallel"], sampled, use_tqdm=False)
        assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
        assert all(len(sample.token_ids) == 12 for sample in output.outputs)
        assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4

    def test_seeded_sampling_survives_preemption(self, llm):
        """A seeded request draws the same tokens alone and in a contended batch."""
        params = SamplingParams(temperature=1.0, seed=11, max_tokens=24, ignore_eos=True)
        (alone,) = llm.generate(["draw"], params, use_tqdm=False)
        together = llm.generate(["draw"] * 5, params, use_tqdm=False)
        assert {tuple(o.outputs[0].token_ids) for o in together} == {
            tuple(alone.outputs[0].token_ids)
        }

    def test_prompt_and_output_logprobs(self, llm):
        """Logprobs come for every token, and the greedy token has the largest."""
        params = greedy(10, logprobs=3, prompt_logprobs=1)
        outputs = llm.generate(["log", "prob", "abilities"], params, use_tqdm=False)
        for output in outputs:
            sample = output.outputs[0]
            assert len(sample.logprobs) == 10
            assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
            for token, ranked in zip(sample.token_ids, sample.logprobs, strict=True):
                assert ranked[token].rank == 1

    def test_stop_string(self, llm):
        """A stop string ends a request early, in the middle of others."""
        (full,) = llm.generate(["where to stop"], greedy(30), use_tqdm=False)
        stop = full.outputs[0].text[8:11]
        outputs = llm.generate(["where to stop"] * 4, greedy(30, stop=[stop]), use_tqdm=False)
        text = full.outputs[0].text
        assert {o.outputs[0].text for o in outputs} == {text[: text.index(stop)]}

    def test_urgent_priority_displaces_running_requests(self, llm):
        """Priority is a class above the levels: urgent first, unimportant into idle places only."""
        engine, finished = llm.llm_engine, []
        for i in range(3):
            engine.add_request(f"long-{i}", f"long {i}", greedy(60))
        engine.add_request("unimportant", "unimportant", greedy(1), priority=1)
        for _ in range(5):
            engine.step()
        engine.add_request("urgent", "urgent", greedy(40), priority=-1)
        while engine.has_unfinished_requests():
            finished += [output.request_id for output in engine.step() if output.finished]
        assert finished[0] == "urgent"
        assert finished.index("unimportant") >= 3, "took a place that a longer one wanted"

    def test_abort_in_every_state(self, llm):
        """Running, paused and queued requests can all be aborted; the rest finish."""
        engine = llm.llm_engine
        names = [str(i) for i in range(8)]
        for name in names:
            engine.add_request(name, f"request {name}", greedy(50))
        finished = []
        for aborted in ([], names[:2], names[3:5], names[7:]):
            engine.abort_request(aborted)
            for _ in range(6):
                finished += [output.request_id for output in engine.step() if output.finished]
        while engine.has_unfinished_requests():
            finished += [output.request_id for output in engine.step() if output.finished]
        assert sorted(finished) == ["2", "5", "6"]

    def test_prefix_cache_reset_while_requests_are_paused(self, llm):
        """Resetting the prefix cache with requests running preempts all; they then finish."""
        engine = llm.llm_engine
        for i in range(6):
            engine.add_request(str(i), f"reset {i}", greedy(30))
        for _ in range(10):
            engine.step()
        assert not engine.reset_prefix_cache(), "blocks are in use"
        assert engine.reset_prefix_cache(reset_running_requests=True)
        scheduler_of(llm).check_integrity()
        finished = []
        while engine.has_unfinished_requests():
            finished += [o for o in engine.step() if o.finished]
        assert sorted(o.request_id for o in finished) == [str(i) for i in range(6)]
        assert all(len(o.outputs[0].token_ids) == 30 for o in finished)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fastserve_config": {"quantum": 1}}, ConfigError, "fastserve_config.quantum"),
        ({"scheduler_cls": "a.B"}, ValueError, "scheduler-cls a.B"),
        ({"kv_offloading_size": 4}, ValueError, "kv-offloading-size 4"),
    ],
)
def test_wrong_arguments_are_refused_at_once(tiny_model, arguments, error, message):
    """`LLM` raises before anything is loaded."""
    with pytest.raises(error, match=message):
        LLM(tiny_model, **arguments)


def test_profile_is_saved_and_pinned(tiny_model, tmp_path, requests, stock_tokens):
    """A step-time profile that one engine saves at shutdown pins the model of the next."""
    path = str(tmp_path / "profile.json")
    config = {"save_step_time_profile": path}
    with running(LLM, tiny_model, fastserve_config=config, max_num_seqs=4) as llm:
        requests.generate(llm)
    profile = json.loads((tmp_path / "profile.json").read_text())
    config = {"step_time_profile": path}
    with running(LLM, tiny_model, fastserve_config=config, max_num_seqs=4) as llm:
        assert requests.generate(llm) == stock_tokens
        assert scheduler_of(llm).step_time.to_profile() == pytest.approx(profile)


def test_stock_llm_is_untouched(tiny_model, stock_tokens):
    """With the package imported and the plugin loaded, `vllm.LLM` still schedules as ever."""
    with running(vllm.LLM, tiny_model, max_num_seqs=2) as llm:
        module = type(scheduler_of(llm)).__module__
        assert module.startswith("vllm.")
        assert llm.llm_engine.vllm_config.kv_transfer_config is None
