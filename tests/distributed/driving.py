"""Drives a server of several workers: tokens, gaps between tokens, and what every worker copied."""

import asyncio
import time
from collections import Counter
from itertools import pairwise

import openai
from prometheus_client.parser import text_string_to_metric_families

IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
COPIES = "vllm:fastserve_worker_copies_total"
STREAMS, STREAM_TOKENS = 4, 64


def greedy(server, prompt, max_tokens, **extra):
    """Arguments of a completion that always generates `max_tokens` tokens."""
    body = {"ignore_eos": True, "return_token_ids": True}
    arguments = {"model": server.model, "prompt": prompt, "max_tokens": max_tokens}
    return {**arguments, "temperature": 0, "extra_body": body, **extra}


def client_of(server):
    """vLLM's server speaks OpenAI's protocol."""
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


async def tokens_of(server, workload):
    """Greedy tokens of all requests of a workload, sent at once."""
    async with client_of(server) as client:
        requests = zip(workload.prompts, workload.max_tokens, strict=True)
        answers = [client.completions.create(**greedy(server, *request)) for request in requests]
        return [answer.choices[0].token_ids for answer in await asyncio.gather(*answers)]


async def gaps_of(server):
    """Seconds between tokens of a few requests that run together and leave memory to spare."""
    async with client_of(server) as client:
        times = await asyncio.gather(*(_stream(client, server, n) for n in range(STREAMS)))
    return sorted(after - before for one in times for before, after in pairwise(one[8:]))


async def _stream(client, server, number):
    prompt = list(range(100 + number, 116 + number))
    stream = await client.completions.create(**greedy(server, prompt, STREAM_TOKENS, stream=True))
    return [time.perf_counter() async for chunk in stream if chunk.choices[0].token_ids]


def samples(server, name):
    """Values of one metric: (labels, value)."""
    for family in text_string_to_metric_families(server.get("/metrics")):
        yield from ((s.labels, s.value) for s in family.samples if s.name == name)


def copies_of(server):
    """Copies that each worker has finished, by engine, rank and direction."""
    found = Counter()
    for labels, value in samples(server, COPIES):
        found[labels["engine"], int(labels["rank"]), labels["direction"]] += int(value)
    return found


def total(server, name):
    """A metric's sum over engines and labels."""
    return sum(value for _, value in samples(server, name))


def held_blocks(server):
    """Blocks that requests hold, on devices and hosts, and those that are being copied."""
    gauges = ("device_blocks", "host_blocks", "in_flight_blocks")
    found = [one for name in gauges for one in samples(server, f"vllm:fastserve_{name}")]
    return sum(v for labels, v in found if labels.get("use") not in ("free", "reclaimable"))


def wait_until_idle(server, timeout_s=60):
    """Until no engine has a request or holds a block; raises AssertionError after the time."""
    deadline = time.monotonic() + timeout_s
    while busy := {name: v for name in IDLE if (v := total(server, name))}:
        assert time.monotonic() < deadline, f"still busy: {busy}"
        time.sleep(0.2)
