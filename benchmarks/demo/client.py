"""Sends the demo's requests to a server and notes when each piece of an answer arrives."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp

from benchmarks.demo.burst import Ask
from benchmarks.http_server import SERVED_NAME


@dataclass(frozen=True)
class Answer:
    """Seconds after asking at which the pieces of an answer arrived."""

    ask: Ask
    times_s: tuple[float, ...]

    @property
    def first_s(self) -> float:
        """Until the first word."""
        return self.times_s[0]

    @property
    def whole_s(self) -> float:
        """Until the last."""
        return self.times_s[-1]

    @property
    def longest_gap_s(self) -> float:
        """The longest pause between two pieces; 0 with a single one."""
        return max((b - a for a, b in itertools.pairwise(self.times_s)), default=0.0)


async def send(
    base_url: str,
    asks: Sequence[Ask],
    on_tokens: Callable[[Ask, int], object] | None = None,
) -> list[Answer]:
    """Send each request at its second; answers in the same order.

    `on_tokens` is called with a piece's tokens whenever one arrives; on a busy machine the server
    sends several at once. Raises RuntimeError for an answer
    that is an error.
    """
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(base_url, connector=connector, timeout=timeout) as session:
        began_s = time.perf_counter()
        return await asyncio.gather(*(_ask(session, ask, began_s, on_tokens) for ask in asks))


async def _ask(
    session: aiohttp.ClientSession,
    ask: Ask,
    began_s: float,
    on_tokens: Callable[[Ask, int], object] | None,
) -> Answer:
    due_s = began_s + ask.at_s
    await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
    body = {
        "model": SERVED_NAME,
        "prompt": ask.prompt,
        "max_tokens": ask.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    times_s: list[float] = []
    received = 0
    async with session.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"the server answered {response.status}: {await response.text()}")
        async for line in response.content:
            so_far = _tokens_so_far(line)
            if so_far > received:
                times_s.append(time.perf_counter() - due_s)
                if on_tokens is not None:
                    on_tokens(ask, so_far - received)
                received = so_far
    if received != ask.tokens:
        raise RuntimeError(f"{received} of {ask.tokens} tokens came back for {ask.prompt!r}")
    return Answer(ask, tuple(times_s))


def _tokens_so_far(line: bytes) -> int:
    """Tokens of the answer up to this line of the stream; 0 for a line that says nothing of them.

    Raises RuntimeError for an error in the stream.
    """
    text = line.decode().removeprefix("data:").strip()
    if not text or text == "[DONE]":
        return 0
    event = json.loads(text)
    if "error" in event:
        raise RuntimeError(f"the server answered {event['error']}")
    return int((event.get("usage") or {}).get("completion_tokens", 0))
