"""`vllm serve --scheduler fastserve`, driven with the official OpenAI client."""

import asyncio
import itertools
import json

import openai
import pytest
import vllm

from fastserve_vllm.metrics import CATALOGUE, Kind

RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"


def greedy(server, prompt, max_tokens, **extra):
    """Arguments of a completion that always generates `max_tokens` tokens."""
    body = {"ignore_eos": True, "return_token_ids": True, **extra.pop("extra_body", {})}
    return {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "extra_body": body,
        **extra,
    }


def live_jobs(metrics):
    """Live requests by state."""
    return {
        labels[0]: value
        for (name, *labels), value in metrics.items()
        if name == "vllm:fastserve_jobs"
    }


@pytest.mark.host_versions
async def test_concurrent_greedy_requests_equal_stock(server, async_client, requests, stock_tokens):
    """Six times as many requests as batch places; every one gets stock vLLM's tokens."""
    assert json.loads(server.get("/version"))["version"] == vllm.__version__
    completions = await asyncio.gather(
        *(
            async_client.completions.create(**greedy(server, prompt, tokens))
            for prompt, tokens in zip(requests.prompts, requests.max_tokens, strict=True)
        )
    )
    assert [completion.choices[0].token_ids for completion in completions] == stock_tokens


def test_chat(server, client):
    """A chat completion, with its usage."""
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Hello."}],
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12


def test_streaming(server, client):
    """The pieces of a stream together are the unstreamed answer; usage comes last."""
    arguments = greedy(server, "once upon a time", 20)
    whole = client.completions.create(**arguments)
    chunks, tokens = streamed(client, arguments)
    assert list(itertools.chain(*tokens)) == whole.choices[0].token_ids
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 20


def test_streaming_token_by_token(paced_server):
    """Every token is sent when it is there, none together with the next one."""
    url = f"{paced_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
        _, tokens = streamed(client, greedy(paced_server, "once upon a time", 20))
    assert [len(step) for step in tokens] == [1] * 20


def streamed(client, arguments):
    """The chunks of a stream, and the token ids in each that has some."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(**arguments, **options))
    return chunks, [chunk.choices[0].token_ids for chunk in chunks if chunk.choices]


def test_parallel_choices(server, client):
    """`n` choices come back, numbered."""
    completion = client.completions.create(
        model=server.model, prompt="two", n=2, max_tokens=8, temperature=1.0, seed=5
    )
    assert [choice.index for choice in completion.choices] == [0, 1]


def test_logprobs(server, client):
    """Each token has its logprob; the greedy one is the best of the alternatives."""
    completion = client.completions.create(**greedy(server, "odds", 6, logprobs=3))
    logprobs = completion.choices[0].logprobs
    assert len(logprobs.token_logprobs) == 6
    for chosen, others in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == pytest.approx(max(others.values()))


def test_json_answer(server, client):
    """Structured output over HTTP."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Well?"}],
        max_tokens=30,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert json.loads(answer.choices[0].message.content)["ok"] in (True, False)


async def test_urgent_request_overtakes(server, async_client):
    """A request of a smaller `priority` is done while those that came before still run."""
    crowd = [
        asyncio.create_task(async_client.completions.create(**greedy(server, f"crowd {i}", 400)))
        for i in range(12)
    ]
    await asyncio.sleep(0.2)
    urgent = greedy(server, "urgent", 30, extra_body={"priority": -1})
    await async_client.completions.create(**urgent)
    assert not any(task.done() for task in crowd)
    await asyncio.gather(*crowd)


@pytest.mark.host_versions
async def test_disconnect_frees_the_request(server, async_client):
    """Clients that go away in mid-stream, running or waiting, leave nothing behind."""
    streams = [
        await async_client.completions.create(**greedy(server, f"leave {i}", 400), stream=True)
        for i in range(6)
    ]
    await anext(aiter(streams[0]))
    for stream in streams:
        await stream.close()
    server.wait_for(RUNNING, WAITING)
    assert not any(live_jobs(server.metrics()).values())


def test_too_long_prompt_is_rejected(server, client):
    """400 with the limit in the message, as stock vLLM answers."""
    with pytest.raises(openai.BadRequestError, match="maximum context length") as error:
        client.completions.create(**greedy(server, [7] * 600, 1))
    assert error.value.status_code == 400


@pytest.mark.host_versions
async def test_metrics_add_up(server, async_client):
    """Every figure of the catalogue is on /metrics; counters grow by what was done."""
    server.wait_for(RUNNING, WAITING)
    before = server.metrics()
    await asyncio.gather(
        *(async_client.completions.create(**greedy(server, f"n {i}", 40)) for i in range(16))
    )
    server.wait_for(RUNNING, WAITING)
    after = server.metrics()

    def grown(name, suffix="_total"):
        def total(values):
            wanted = f"vllm:fastserve_{name}{suffix}"
            return sum(value for (found, *_), value in values.items() if found == wanted)

        return total(after) - total(before)

    names = {name for name, *_ in after}
    for metric in CATALOGUE:
        suffix = "_count" if metric.kind is Kind.HISTOGRAM else ""
        assert metric.sample_name + suffix in names, metric
    assert grown("joins") == 16
    assert grown("started") >= 16
    assert grown("started") - grown("preemptions") == 16
    assert grown("step_seconds", "_count") >= 160, "16 requests of 40 tokens in 4 places"
    assert grown("queue_wait_seconds", "_count") == grown("started")
    assert 0 < grown("scheduler_seconds") < grown("step_seconds", "_sum")
    assert grown("predicted_step_seconds") > 0
    assert grown("batch_tokens") >= 16 * 40
    assert not any(live_jobs(after).values())
    levels = [v for (name, *_), v in after.items() if name == "vllm:fastserve_level_jobs"]
    assert levels == [0] * 7
    assert after[("vllm:fastserve_quantum_seconds", "0")] == pytest.approx(0.002)
