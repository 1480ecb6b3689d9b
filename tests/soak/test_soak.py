"""A short soak of a real server, and what its clients see when its engine dies."""

import asyncio
import os
import time

import httpx
import psutil
import pytest
from serving import serving
from soak import CHECK_EVERY, FLAGS, lengths, server_processes, soak, verdict
from traffic import Traffic

MINUTES = 0.6


@pytest.fixture(scope="module")
def server(tiny_model, subprocess_env, tmp_path_factory):
    log = tmp_path_factory.mktemp("soak") / "server.log"
    with serving(tiny_model, FLAGS, subprocess_env | SWITCHES, log) as server:
        yield server


# vLLM compiles its ranking of logprobs at first use: ten seconds, for nothing that is tested.
SWITCHES = {"FASTSERVE_CHECK_EVERY": str(CHECK_EVERY), "TORCHDYNAMO_DISABLE": "1"}


def test_mixed_traffic_leaves_nothing_behind(server):
    """Bursts, disconnects and starved memory: all requests end, all blocks are back."""
    minutes = float(os.environ.get("MINUTES", MINUTES))
    figures = asyncio.run(soak(server, minutes))
    # So short a run still warms up: allocators and imports take some MiB.
    assert not verdict(figures, rss_tolerance=0.10), figures
    assert figures["ends"]["answered"] >= 20
    assert "AssertionError" not in server.log.read_text()


def test_request_text_is_not_logged(server):
    """What people write is in neither the server's log nor the labels of its metrics."""
    secret = "Xylophone-Quarantine-7731"
    body = {"model": server.model, "prompt": f"My word is {secret}.", "max_tokens": 300}
    body |= {"ignore_eos": True, "user": secret}
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for number in range(6):
            headers = {"X-Request-Id": f"{secret}-{number}"}
            assert http.post("/v1/completions", json=body, headers=headers).status_code == 200
        metrics = http.get("/metrics").text
    assert secret not in metrics
    assert secret not in server.log.read_text()


def test_engine_that_dies_in_mid_load_gives_clean_errors(server):
    """Every client hears of it at once, as an error or the end of its connection; none hangs."""
    (main,) = server_processes(server)
    (engine,) = [p for p in main.children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
    ends, waited_s = asyncio.run(_kill_in_mid_load(server, engine))
    assert set(ends) <= {500, 503, "connection"}, ends
    assert len(ends) == 12
    assert waited_s < 20
    main.wait(30)


async def _kill_in_mid_load(server, engine):
    traffic = Traffic(server.url, server.model, lengths())

    async def client(number):
        body = {"model": server.model, "prompt": f"client {number}", "max_tokens": 400}
        body |= {"ignore_eos": True, "stream": number % 2 == 0}
        try:
            answer = await traffic.http.post("/v1/completions", json=body)
        except httpx.TransportError:
            return "connection"
        if answer.status_code == 200:
            return 500 if '"error"' in answer.text else f"200: {answer.text[-200:]}"
        return answer.status_code

    clients = [asyncio.create_task(client(number)) for number in range(12)]
    await asyncio.sleep(0.5)
    engine.send_signal(psutil.signal.SIGKILL)
    begun = time.monotonic()
    ends = await asyncio.gather(*clients)
    return ends, time.monotonic() - begun
