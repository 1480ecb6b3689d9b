#!/usr/bin/env python3
"""Wait until a vLLM server is ready, then print a request to try it with.

    python scripts/announce.py BASE_URL SERVER_PID

Polls /health once a second and gives up silently when the process SERVER_PID is gone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from http.client import HTTPException
from urllib.request import urlopen

POLL_INTERVAL_S = 1.0
QUESTION = "What is the capital of France?"


def is_alive(pid: int) -> bool:
    """Whether a process with this id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_healthy(base_url: str) -> bool:
    """Whether the server answers /health with success; False while it is not listening."""
    try:
        with urlopen(f"{base_url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException):
        return False


def announcement(base_url: str) -> str:
    """A curl line for the first model that the server lists."""
    with urlopen(f"{base_url}/v1/models", timeout=5) as response:
        model = json.load(response)["data"][0]["id"]
    messages = [{"role": "user", "content": QUESTION}]
    request = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 64}
    body = json.dumps(request)
    return (
        f"\nready on {base_url} - ctrl-C stops it. Try, in another terminal:\n\n"
        f"curl -s {base_url}/v1/chat/completions"
        f" -H 'Content-Type: application/json' -d '{body}'\n"
    )


def main() -> None:
    """Command line."""
    base_url, server_pid = sys.argv[1], int(sys.argv[2])
    while is_alive(server_pid):
        if is_healthy(base_url):
            print(announcement(base_url), flush=True)
            return
        time.sleep(POLL_INTERVAL_S)


if __name__ == "__main__":
    main()
