"""Clients that behave like people: bursts, all kinds of requests, and some who leave early."""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tokenizers import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
TOKEN_IDS = {"return_token_ids": True}
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
# No client waits longer than this for anything: a request that hangs shows as a timeout.
PATIENCE_S = 120.0


@dataclass
class Tally:
    """How the requests ended; `wrong` says what should not have happened."""

    ends: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, end: str) -> None:
        self.ends[end] += 1


class Traffic:
    """Sends requests to one server for as long as it is told to.

    Args:
        url: of the server.
        model: its name there, which is its folder.
        lengths: (prompt tokens, output tokens) of requests, as a trace has them.
        seed: of every choice that a client makes.
        clients: most requests at a time.
    """

    def __init__(self, url, model, lengths, *, seed=0, clients=24):
        self.dice = random.Random(seed)
        self.model, self.lengths, self.clients = model, lengths, clients
        self.tally = Tally()
        self.tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits)

    async def run(self, seconds):
        """Bursts with pauses between them; returns when every client has ended."""
        loop = asyncio.get_running_loop()
        until, clients = loop.time() + seconds, set()
        while loop.time() < until:
            for _ in range(self.dice.choice([1, 1, 2, 3, 20])):
                if len(clients) < self.clients:
                    clients.add(asyncio.create_task(self.client(self.dice.random())))
            await asyncio.sleep(self.dice.expovariate(6))
            clients = {client for client in clients if not client.done()}
        await asyncio.gather(*clients)

    async def client(self, seed):
        """One request, whatever becomes of it."""
        dice = random.Random(seed)
        kinds = [self.stream] * 4 + [self.completion] * 3
        kinds += [self.leave] * 3 + [self.chat, self.grammar, self.samples, self.too_long]
        kind = dice.choice(kinds)
        try:
            self.tally.note(await kind(dice))
        except (httpx.HTTPError, AssertionError) as error:
            self.tally.note("failed")
            self.tally.wrong.append(f"{kind.__name__}: {type(error).__name__} {error}")

    def body(self, dice, **extra):
        """A completion that generates exactly what it asks for."""
        prompt, output = dice.choice(self.lengths)
        return {
            "model": self.model,
            "prompt": [dice.randrange(10, 2000) for _ in range(prompt)],
            "max_tokens": output,
            "temperature": dice.choice([0, 0, 1]),
            "ignore_eos": True,
            "priority": dice.choice([0, 0, 0, 0, -1, 1]),
            **extra,
        }

    async def post(self, path, body, status=200):
        answer = await self.http.post(path, json=body)
        assert answer.status_code == status, f"{answer.status_code}: {answer.text[:200]}"
        return answer.json()

    async def completion(self, dice):
        body = self.body(dice)
        answer = await self.post("/v1/completions", body)
        assert answer["usage"]["completion_tokens"] == body["max_tokens"]
        return "answered"

    async def samples(self, dice):
        # Not seeded: a seeded request whose prefill is chunked ends vLLM's CPU worker.
        answer = await self.post("/v1/completions", self.body(dice, n=3, temperature=1))
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        return "answered"

    async def chat(self, dice):
        body = {**self.body(dice), "messages": [{"role": "user", "content": "Hello there."}]}
        del body["prompt"]
        answer = await self.post("/v1/chat/completions", body)
        assert answer["usage"]["completion_tokens"] == body["max_tokens"]
        return "answered"

    async def grammar(self, dice):
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body = {**self.body(dice), "response_format": form, "max_tokens": 30, "ignore_eos": False}
        (choice,) = (await self.post("/v1/completions", body | TOKEN_IDS))["choices"]
        # White space may use up the tokens; what is complete has to obey.
        if choice["finish_reason"] != "length":
            self.check_object(body["prompt"], choice)
        return "answered"

    def check_object(self, prompt, choice):
        """The generated tokens are the object, and so is the text.

        Where a prompt ends within a character, vLLM repeats it at the beginning of the text, with
        any scheduler; a prompt of random tokens often does.
        """
        said = self.tokenizer.decode(choice["token_ids"])
        read = self.tokenizer.decode(prompt)
        repeated = read if read.endswith(HALF_A_CHARACTER) else ""
        assert choice["text"] == repeated + said, (choice["text"], said)
        try:
            assert json.loads(said)["ok"] in (True, False)
        except json.JSONDecodeError:
            raise AssertionError(said, choice["finish_reason"]) from None

    async def too_long(self, dice):
        body = {**self.body(dice), "prompt": [7] * 5000}
        answer = await self.post("/v1/completions", body, status=400)
        assert "maximum context length" in json.dumps(answer)
        return "refused"

    async def stream(self, dice):
        """Read to the end; every token arrives."""
        body = self.body(dice, stream=True, stream_options={"include_usage": True})
        usage = None
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    assert "error" not in chunk, chunk
                    usage = chunk.get("usage") or usage
        assert usage is not None, "the stream ended early"
        assert usage["completion_tokens"] == body["max_tokens"]
        return "answered"

    async def leave(self, dice):
        """Go away: before the answer, or in the middle of the stream."""
        body = self.body(dice, stream=dice.random() < 0.7)
        request = asyncio.create_task(self._read_all(body))
        await asyncio.wait([request], timeout=dice.choice([0.005, 0.1, 0.5, 2.0]))
        if request.done():
            return "answered" if request.result() == 200 else "failed"
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        return "left"

    async def _read_all(self, body):
        async with self.http.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_bytes():
                pass
        return answer.status_code
