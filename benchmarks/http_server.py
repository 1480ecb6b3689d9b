"""A `vllm serve` process of our own: started, waited for, warmed up and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.engine import SMALL_MACHINE_ENVIRONMENT, EngineShape
from benchmarks.systems import System

SERVED_NAME = "benchmark"
# The client keeps idle connections for a minute; a server that closes them earlier now and then
# does so just as the client uses one, and the request is lost.
_SERVER_ENVIRONMENT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120"}
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    base_url: str
    model: Path


def vllm_command() -> str:
    """Path of the `vllm` command beside this Python. Raises FileNotFoundError without one."""
    command = Path(sys.executable).with_name("vllm")
    if not command.is_file():
        raise FileNotFoundError("no vllm command beside this Python")
    return str(command)


def environment() -> dict[str, str]:
    """Environment of servers and clients."""
    return os.environ | SMALL_MACHINE_ENVIRONMENT


def serve_flags(shape: EngineShape) -> list[str]:
    """The engine's size as flags of `vllm serve`."""
    flags = []
    for name, value in shape.arguments().items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] if value is True else [flag, str(value)]
    return flags


@contextmanager
def serving(shape: EngineShape, system: System, log: Path) -> Iterator[Server]:
    """Run a server for the length of the block; its output goes to `log`.

    Raises ValueError for a system without a command line, RuntimeError if the server dies.
    """
    if system.serve_arguments is None:
        raise ValueError(f"{system.name} cannot be served over HTTP")
    port = _free_port()
    command = [vllm_command(), "serve", str(shape.model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", SERVED_NAME]
    command += ["--disable-uvicorn-access-log", *serve_flags(shape), *system.serve_arguments]
    with log.open("w", encoding="utf-8") as output:
        process = _start(command, output)
        try:
            server = Server(f"http://127.0.0.1:{port}", shape.model)
            _wait_until_ready(process, server, log)
            yield server
        finally:
            _stop(process)


def warm_up(server: Server, requests: int, output_tokens: int = 32) -> None:
    """Send short requests, all at once, so that no measured one meets a cold server."""
    prompts = [f"warm up number {number}" for number in range(requests)]
    with ThreadPoolExecutor(max_workers=requests) as pool:
        list(pool.map(lambda prompt: _complete(server, prompt, output_tokens), prompts))


def _complete(server: Server, prompt: str, output_tokens: int) -> None:
    body: dict[str, Any] = {
        "model": SERVED_NAME,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        response.read()


def _start(command: Sequence[str], output: IO[str]) -> subprocess.Popen[str]:
    # A session of its own, so that stopping reaches the engine process too.
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment() | _SERVER_ENVIRONMENT,
        text=True,
        start_new_session=True,
    )


def _wait_until_ready(process: subprocess.Popen[str], server: Server, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{_tail(log)}")
        if _answers(f"{server.base_url}/health"):
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not answer in {_START_TIMEOUT_S:.0f} s:\n{_tail(log)}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _stop(process: subprocess.Popen[str]) -> None:
    """Ask the server to end, then end whatever is left of its session."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, lines: int = 30) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
