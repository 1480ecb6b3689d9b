"""The demo, with a server that stands in for vLLM's."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks.demo import __main__ as demo
from benchmarks.demo.burst import KINDS, Ask, burst
from benchmarks.demo.client import Answer, send
from benchmarks.demo.plot import picture


def answers(story_first_s, question_first_s):
    def of(ask):
        first = story_first_s if ask.kind == "story" else question_first_s
        return Answer(ask, (first, first + 0.1, first + 0.4))

    return [of(ask) for ask in burst()]


BOTH = {"stock vLLM": answers(1.0, 8.0), "FastServe": answers(1.5, 0.2)}


async def stream(request):
    body = await request.json()
    if body["prompt"] == "fail":
        return web.json_response({"error": "no"}, status=400)
    response = web.StreamResponse()
    await response.prepare(request)
    wanted = body["max_tokens"] - (body["prompt"] == "short")
    for tokens in [*range(1, wanted, 2), wanted]:
        event = json.dumps({"choices": [{"text": "a"}], "usage": {"completion_tokens": tokens}})
        await response.write(f"data: {event}\n\n".encode())
    usage = json.dumps({"choices": [], "usage": {"completion_tokens": wanted}})
    await response.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
    return response


def sent(asks, pieces=None):
    def note(ask, tokens):
        if pieces is not None:
            pieces.append((ask.kind, tokens))

    async def run():
        app = web.Application()
        app.router.add_post("/v1/completions", stream)
        async with TestServer(app) as server:
            return await send(
                str(server.make_url("/")),
                asks,
                lambda ask, tokens: pieces is not None and pieces.append((ask.kind, tokens)),
            )

    return asyncio.run(run())


def test_the_client_notes_every_piece():
    """In order, from when each request was due; nothing else in the stream counts."""
    pieces = []
    story, question = sent([Ask("story", 0.0, "a", 5), Ask("question", 0.05, "b", 2)], pieces)
    assert (len(story.times_s), len(question.times_s)) == (3, 2)
    assert list(story.times_s) == sorted(story.times_s)
    assert min(question.times_s) >= 0
    assert [tokens for kind, tokens in pieces if kind == "story"] == [1, 2, 2]


@pytest.mark.parametrize(
    ("prompt", "message"), [("fail", "answered 400"), ("short", "4 of 5 tokens came back")]
)
def test_an_answer_that_is_none_ends_the_demo(prompt, message):
    """Half a comparison is none."""
    with pytest.raises(RuntimeError, match=message):
        sent([Ask("story", 0.0, prompt, 5)])


def test_the_batch_is_full_when_the_questions_come():
    """Otherwise there is nothing to see."""
    asks = burst()
    stories = [ask for ask in asks if ask.kind == "story"]
    questions = [ask for ask in asks if ask.kind == "question"]
    assert len(stories) > demo.BATCH
    assert max(a.at_s for a in stories) < min(a.at_s for a in questions)
    assert set(KINDS) == {ask.kind for ask in asks}


def test_the_table_shows_better_and_worse():
    """Seconds on both systems, and their ratio."""
    found = demo.figures(BOTH)
    assert found["questions: first word, median"] == pytest.approx([8.0, 0.2])
    assert found["stories: first word, median"] == pytest.approx([1.0, 1.5])
    assert found["stories: longest pause inside"] == pytest.approx([0.3, 0.3])
    assert demo.comparison(BOTH).row_count == len(found)


def test_plots_have_every_request(tmp_path):
    """One on the terminal, one as a picture."""
    text = demo.terminal_plot(BOTH)
    assert "stock vLLM" in text
    assert "FastServe" in text
    picture(BOTH).savefig(tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_bad_models_are_refused(tmp_path, capsys):
    """With status 2 and one line, before a server starts."""
    assert demo.main(["--model", str(tmp_path)]) == 2
    assert "not a model folder" in capsys.readouterr().err
