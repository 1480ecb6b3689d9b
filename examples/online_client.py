"""Concurrent streams from a running server, with the OpenAI client.

vllm serve MODEL --scheduler fastserve --max-num-seqs 4
python examples/online_client.py [--base-url http://127.0.0.1:8000/v1] [--model NAME]
"""

import argparse
import asyncio
import time

from openai import AsyncOpenAI


async def stream(client: AsyncOpenAI, model: str, number: int, max_tokens: int) -> None:
    """Ask one question; print when the first and the last part of the answer came."""
    started_s, first_s, parts = time.perf_counter(), None, 0
    answer = await client.completions.create(
        model=model,
        prompt=f"Question {number}:",
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        # vLLM's own: always generate max_tokens; smaller priorities are more urgent.
        extra_body={"ignore_eos": True, "priority": 0},
    )
    async for _ in answer:
        first_s = first_s or time.perf_counter() - started_s
        parts += 1
    done_s = time.perf_counter() - started_s
    print(f"request {number:2}: {parts:3} parts, first after {first_s:.3f} s, all {done_s:.3f} s")


async def main() -> None:
    """Twelve streams, every third of which is ten times as long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first that the server has")
    args = parser.parse_args()
    async with AsyncOpenAI(base_url=args.base_url, api_key="none") as client:
        model = args.model or (await client.models.list()).data[0].id
        await asyncio.gather(*(stream(client, model, i, 16 if i % 3 else 160) for i in range(12)))


if __name__ == "__main__":
    asyncio.run(main())
