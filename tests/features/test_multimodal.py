"""Images: a model that sees, under preemption, against stock vLLM."""

import pytest
import vllm
from features import texts
from tiny_engine import greedy, running, scheduler_of
from tiny_llava import IMAGE, picture, write_llava

from fastserve_vllm import LLM

COUNT = 10
TIGHT = {"max_num_seqs": 4, "num_gpu_blocks_override": 20}
CONFIG = {"base_quantum_s": 0.002, "starvation_limit_s": 0.3}
ENGINE = {"limit_mm_per_prompt": {"image": 2}, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def llava(tiny_model, tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("models"), tiny_model)


def prompts():
    """Some with an image, some with two, some with none; a few images come more than once."""
    found = []
    for number, text in enumerate(texts(COUNT)):
        images = [picture(k) for k in range(number % 4, number % 4 + number % 3)]
        data = {"multi_modal_data": {"image": images}} if images else {}
        found.append({"prompt": IMAGE * len(images) + text, **data})
    return found


def answers(llm):
    outputs = llm.generate(prompts(), greedy(40), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.host_versions
def test_images_under_preemption(llava):
    """Encoder outputs, their cache and their budget survive being preempted: stock's tokens."""
    with running(vllm.LLM, llava, max_num_seqs=16, **ENGINE) as llm:
        expected = answers(llm)
        one, other = (
            {"prompt": IMAGE + "the", "multi_modal_data": {"image": picture(k)}} for k in (1, 5)
        )
        seen = [o.outputs[0].token_ids for o in llm.generate([one, other], greedy(8))]
        assert seen[0] != seen[1], "the model does not see"
    with running(LLM, llava, fastserve_config=CONFIG, **ENGINE, **TIGHT) as llm:
        assert answers(llm) == expected
        counters = scheduler_of(llm).planner.counters
        assert counters.paused + counters.spilled + counters.swapped_out > 5
        scheduler_of(llm).check_integrity()
        assert scheduler_of(llm).kv_cache_manager.usage == 0
