"""Lets a worker fail in the middle of a KV copy, and watches how the server ends."""

import asyncio
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import openai
from driving import client_of, greedy

# What happens to the process of rank 1; None: only its copy goes no further.
KINDS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "copy held": None}
COPY_TIMEOUT_S, END_TIMEOUT_S = 60, 120
# vLLM's own lines, and the one that its worker sends for a copy that stalls.
_ERRORS = re.compile(
    r"(EngineDeadError|died unexpectedly|RPC call to \w+ timed out|copy \d+ has not finished)"
)


async def fail(server, kind, folder, workload):
    """Fail rank 1 of a server that was started with `FASTSERVE_TEST_HOLD=folder`.

    Returns:
        "seconds" until the server had ended, its "exit_code", which "errors" its log names, and how
        many requests were "answered" and "refused".

    Raises:
        TimeoutError: no copy began, or the server or a request hung.
    """
    hold, held = folder / "hold-1", folder / "held-1"
    hold.touch()
    async with client_of(server) as client:
        requests = zip(workload.prompts, workload.max_tokens, strict=True)
        calls = [client.completions.create(**greedy(server, *request)) for request in requests]
        answers = asyncio.gather(*calls, return_exceptions=True)
        pid = await asyncio.wait_for(_number_in(held), COPY_TIMEOUT_S)
        started = time.monotonic()
        try:
            if KINDS[kind] is not None:
                os.kill(pid, KINDS[kind])
            answers = await asyncio.wait_for(answers, END_TIMEOUT_S)
            exit_code = await asyncio.to_thread(server.process.wait, END_TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    refused = [answer for answer in answers if isinstance(answer, Exception)]
    assert all(isinstance(one, openai.APIError) for one in refused), refused
    return {
        "seconds": time.monotonic() - started,
        "exit_code": exit_code,
        "errors": sorted(set(_ERRORS.findall(server.log.read_text()))),
        "answered": len(answers) - len(refused),
        "refused": len(refused),
    }


async def _number_in(path: Path):
    while not (path.exists() and path.read_text()):
        await asyncio.sleep(0.02)
    return int(path.read_text())
