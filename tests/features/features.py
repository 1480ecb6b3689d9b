"""What users ask of an engine: each a function that returns something that can be compared."""

import random
import re
from dataclasses import dataclass, field

from tiny_engine import greedy
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, StructuredOutputsParams

MAX_STEPS = 4000
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "ran",
    "far",
    "away",
    "from",
    "some",
    "other",
    "old",
    "dog",
]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def texts(count, seed=0):
    """Prompts of different lengths, half of which begin alike."""
    dice = random.Random(seed)
    shared = " ".join(WORDS * 2)
    return [
        (shared if number % 2 else "") + " ".join(dice.choices(WORDS, k=dice.choice([3, 12, 40])))
        for number in range(count)
    ]


def tokens(outputs):
    """Token ids of all samples of all requests."""
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


def ask(llm, params, count=6, **options):
    """Generate for `count` prompts."""
    return llm.generate(texts(count), params, use_tqdm=False, **options)


def run_out(llm, finished=()):
    """Step the engine until nothing is left; token ids of what finished, by request."""
    engine, found = llm.llm_engine, list(finished)
    for _ in range(MAX_STEPS):
        if not engine.has_unfinished_requests():
            break
        found += [output for output in engine.step() if output.finished]
    assert not engine.has_unfinished_requests(), "requests never finish"
    return {output.request_id: list(output.outputs[0].token_ids) for output in found}


def begin(llm, count=6, steps=12, max_tokens=40):
    """Requests under way: some run, some wait."""
    for number, text in enumerate(texts(count)):
        llm.llm_engine.add_request(str(number), text, greedy(max_tokens))
    found = []
    for _ in range(steps):
        found += [output for output in llm.llm_engine.step() if output.finished]
    return found


# ---- the features -----------------------------------------------------------------------------


def plain(llm):
    return tokens(ask(llm, greedy(40), count=10))


def parallel_samples(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
    return tokens(ask(llm, params, count=3))


def beam_search(llm):
    prompts = [{"prompt": text} for text in texts(3)]
    params = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
    outputs = llm.beam_search(prompts, params)
    return [[list(beam.tokens) for beam in output.sequences] for output in outputs]


def logprobs(llm):
    """Ranks and rounded values, of the answer and of the prompt."""

    def rounded(entries):
        return [
            {t: (one.rank, round(one.logprob, 3)) for t, one in entry.items()} if entry else None
            for entry in entries
        ]

    outputs = ask(llm, greedy(24, logprobs=2, prompt_logprobs=1))
    return [
        (rounded(output.outputs[0].logprobs), rounded(output.prompt_logprobs)) for output in outputs
    ]


def json_schema(llm):
    grammar = StructuredOutputsParams(json=SCHEMA)
    return tokens(
        ask(llm, SamplingParams(temperature=0, max_tokens=60, structured_outputs=grammar))
    )


def regex_beside_free_text(llm):
    grammar = StructuredOutputsParams(regex=r"[a-f]{8}-[0-9]{6}-(yes|no)")
    obeys = SamplingParams(temperature=0, max_tokens=30, structured_outputs=grammar)
    return tokens(ask(llm, [obeys, greedy(30)] * 3))


def choice(llm):
    grammar = StructuredOutputsParams(choice=["positively", "negatively", "undecided"])
    return tokens(ask(llm, SamplingParams(temperature=0, structured_outputs=grammar), count=8))


def regex_after_half_a_character(llm):
    """A prompt that ends within a character is repeated in the text; the tokens obey all the same.

    Free text before the pattern would be free tokens, if the grammar were what failed.
    """
    pattern, tokenizer = r"[a-f]{8}-[0-9]{6}-(yes|no)", llm.get_tokenizer()
    first_byte = tokenizer.encode("\N{SNOWMAN}")[0]
    prompts = [{"prompt_token_ids": [*tokenizer.encode(text), first_byte]} for text in texts(6)]
    grammar = StructuredOutputsParams(regex=pattern)
    params = SamplingParams(temperature=0, max_tokens=30, structured_outputs=grammar)
    answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    for answer in answers:
        said = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert re.fullmatch(pattern, said), said
        assert answer.text.endswith(said)
    return [(list(answer.token_ids), answer.text) for answer in answers]


def stop_strings(llm):
    full = ask(llm, greedy(30))
    params = [greedy(30, stop=[output.outputs[0].text[9:12]]) for output in full]
    return [(o.outputs[0].text, o.outputs[0].stop_reason) for o in ask(llm, params)]


def stop_tokens_and_lengths(llm):
    """`ignore_eos`, `min_tokens` and `stop_token_ids`, against an EOS forced by a bias."""
    drawn = [list(output.outputs[0].token_ids) for output in ask(llm, greedy(24))]
    eager = {"temperature": 0, "max_tokens": 24, "logit_bias": {1: 100.0}}
    params = [
        SamplingParams(**eager),
        SamplingParams(**eager, ignore_eos=True),
        SamplingParams(**eager, min_tokens=9),
        greedy(24, stop_token_ids=[drawn[3][10]]),
        greedy(24, stop_token_ids=[drawn[4][3]], min_tokens=20),
        greedy(1),
    ]
    return [(o.outputs[0].token_ids, o.outputs[0].finish_reason) for o in ask(llm, params)]


def penalties_and_bad_words(llm):
    """Sampling that hangs on what was generated before."""
    params = [
        greedy(30, repetition_penalty=1.5),
        greedy(30, presence_penalty=1.0, frequency_penalty=0.5),
        greedy(30, bad_words=["the", " a"]),
    ]
    return tokens(ask(llm, params * 2))


def seeded_sampling(llm):
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, top_k=40, seed=i, max_tokens=30, ignore_eos=True)
        for i in range(6)
    ]
    return tokens(ask(llm, params))


def priorities(llm):
    """Urgent requests that come when all places are taken, and some that can wait."""
    engine, finished = llm.llm_engine, []
    for number, text in enumerate(texts(9)):
        engine.add_request(str(number), text, greedy(30), priority=(1, 0, -1)[number // 3])
        for _ in range(4):
            finished += [output for output in engine.step() if output.finished]
    return run_out(llm, finished)


def chat(llm):
    talks = [[{"role": "user", "content": text}] for text in texts(6)]
    return tokens(llm.chat(talks, greedy(30), use_tqdm=False))


def streamed_deltas(llm):
    """Tokens that arrive step by step add up."""
    engine, found = llm.llm_engine, {}
    params = greedy(30, output_kind=RequestOutputKind.DELTA)
    for number, text in enumerate(texts(6)):
        engine.add_request(str(number), text, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
    return found


def abort_in_mid_flight(llm):
    finished = begin(llm)
    llm.llm_engine.abort_request(["1", "4"])
    return run_out(llm, finished)


def pause_and_resume(llm):
    """Sleep of level 0: what is under way is kept, and goes on afterwards."""
    finished = begin(llm)
    llm.sleep(level=0, mode="keep")
    llm.llm_engine.add_request("late", texts(1)[0], greedy(10))
    for _ in range(3):
        assert not [o for o in llm.llm_engine.step() if o.finished], "a paused engine went on"
    llm.wake_up(tags=["scheduling"])
    return run_out(llm, finished)


def pause_with_abort(llm):
    """Sleep that ends what is under way; the engine serves again afterwards."""
    begin(llm)
    llm.sleep(level=0, mode="abort")
    # In one process, vLLM's front end is not told of what the pause has aborted.
    llm.llm_engine.abort_request([str(number) for number in range(6)])
    llm.wake_up(tags=["scheduling"])
    run_out(llm)
    return tokens(ask(llm, greedy(20)))


def reset_prefix_cache(llm):
    """With everything that runs: it is computed again, to the same tokens."""
    finished = begin(llm)
    assert llm.reset_prefix_cache(reset_running_requests=True)
    return run_out(llm, finished)


def reload_weights(llm):
    """The same weights again, in mid-flight and with the caches cleared."""
    finished = begin(llm)
    llm.collective_rpc("reload_weights")
    assert llm.reset_prefix_cache(reset_running_requests=True)
    return run_out(llm, finished)


def prefix_hits(llm):
    """The second time, prompts are found in the cache."""
    prompt = " ".join(WORDS * 6)
    first = llm.generate([prompt], greedy(8), use_tqdm=False)
    again = llm.generate([prompt] * 4, greedy(20), use_tqdm=False)
    assert all(output.num_cached_tokens > 0 for output in again)
    return tokens(first) + tokens(again)


def drafts(llm):
    """Prompts that repeat themselves, so that n-gram drafts are accepted and rejected."""
    prompts = [" ".join(WORDS[: 3 + number] * 4) for number in range(8)]
    return tokens(llm.generate(prompts, greedy(50), use_tqdm=False))


def embeddings(llm):
    """Vectors, rounded; prompts that take many steps."""
    prompts = [" ".join(WORDS * repeats) for repeats in (1, 9, 3, 8, 2, 10, 1, 7)]
    outputs = llm.embed(prompts, use_tqdm=False)
    return [[round(value, 4) for value in output.outputs.embedding] for output in outputs]


def adapters(llm, paths):
    """More adapters in flight than a step may hold."""
    loras = [LoRARequest(path.name, i, str(path)) for i, path in enumerate(paths, 1)]
    same = [texts(1)[0]] * len(loras)
    answers = tokens(llm.generate(same, greedy(12), use_tqdm=False, lora_request=loras))
    assert len({str(answer) for answer in answers}) == len(loras), "adapters make no difference"
    return tokens(ask(llm, greedy(30), count=2 * len(loras), lora_request=loras * 2))


@dataclass(frozen=True)
class Kind:
    """An engine, and the features that are asked of it.

    Attributes:
        args: engine arguments of both sides.
        tight: further ones of the FastServe side, so that everybody is preempted.
        features: what is asked, in this order.
        alone: the FastServe side needs a process of its own.
    """

    features: tuple
    args: dict = field(default_factory=dict)
    tight: dict = field(default_factory=dict)
    alone: bool = False


# Twenty blocks of 32 tokens, one of them null: one long request, or a few short ones.
STARVED = {"max_num_seqs": 2, "num_gpu_blocks_override": 20}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}

KINDS = {
    "chunked": Kind(
        (
            plain,
            beam_search,
            logprobs,
            json_schema,
            regex_beside_free_text,
            regex_after_half_a_character,
            choice,
            stop_strings,
            stop_tokens_and_lengths,
            penalties_and_bad_words,
            priorities,
            chat,
            streamed_deltas,
            abort_in_mid_flight,
            pause_and_resume,
            pause_with_abort,
            reset_prefix_cache,
            reload_weights,
            prefix_hits,
        ),
        tight={**STARVED, "max_num_batched_tokens": 64},
    ),
    "unchunked, nothing cached": Kind(
        # On a CPU, vLLM cannot serve a seeded request whose prefill is chunked.
        (plain, logprobs, json_schema, parallel_samples, seeded_sampling, reset_prefix_cache),
        args={"enable_chunked_prefill": False, "enable_prefix_caching": False},
        tight={**STARVED, "max_num_batched_tokens": 512},
    ),
    "adapters": Kind(
        (adapters,),
        args={"enable_lora": True, "max_loras": 1, "max_cpu_loras": 4, "max_lora_rank": 8},
        tight=STARVED,
    ),
    "pooling": Kind(
        (embeddings,),
        args={"runner": "pooling", "convert": "embed"},
        tight={**STARVED, "max_num_batched_tokens": 64},
    ),
    # Drafts change no greedy token, so stock vLLM answers without them. Once their compiler is
    # loaded, vLLM 0.32 starts no second engine in a process.
    "n-gram drafts": Kind(
        (plain, drafts, json_schema, abort_in_mid_flight),
        tight={**STARVED, "speculative_config": NGRAM},
        alone=True,
    ),
}

# Queues so short that nobody runs for more than some steps at a time.
SETTINGS = {"base_quantum_s": 0.001, "starvation_limit_s": 0.5, "swap_space_gib": 0.05}
# Beams are requests of one token each: nobody among them runs for long enough to be preempted.
UNDISTURBED = {beam_search}


def observed(llm, kind, feature, call):
    """What the feature gives on a FastServe engine, and how often somebody was preempted.

    Raises:
        AssertionError: something stayed behind.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    before = preemptions(scheduler)
    found = call(feature, llm)
    for _ in range(200):  # Copies that are still under way hold on to their blocks.
        if scheduler.kv_cache_manager.usage == 0:
            break
        llm.llm_engine.step()
    scheduler.check_integrity()
    assert not scheduler.planner.jobs
    assert scheduler.kv_cache_manager.usage == 0
    return found, preemptions(scheduler) - before


def preemptions(scheduler):
    counters = scheduler.planner.counters
    return counters.paused + counters.spilled + counters.recomputed + counters.swapped_out
