"""A `vllm serve` process of our own: started, waited for and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.engine import SMALL_MACHINE_ENVIRONMENT, EngineShape
from benchmarks.plugins import plugin_environment
from benchmarks.systems import System, flags_of

SERVED_NAME = "benchmark"
_SERVER_ENVIRONMENT = {
    # The client keeps idle connections for a minute; a server that closes them earlier now and
    # then does so just as the client uses one, and the request is lost.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "120",
    # On a CPU, vLLM puts a single worker into a process of its own unless this is off. The engine
    # and the worker then both poll without sleeping, and on two cores nobody else gets to run.
    # The engine stays in a process of its own, with the worker in it, as on a GPU.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Server:
    """A server that answers; its processes are those of a session of their own."""

    base_url: str
    model: Path
    session: int
    plugins: Path


def vllm_command() -> str:
    """Path of the `vllm` command beside this Python. Raises FileNotFoundError without one."""
    command = Path(sys.executable).with_name("vllm")
    if not command.is_file():
        raise FileNotFoundError("no vllm command beside this Python")
    return str(command)


def environment() -> dict[str, str]:
    """Environment of servers and clients."""
    return os.environ | SMALL_MACHINE_ENVIRONMENT


@contextmanager
def serving(shape: EngineShape, system: System, log: Path) -> Iterator[Server]:
    """Run a server for the length of the block; its output goes to `log`, plugins beside it.

    Raises ValueError for a system without a command line, RuntimeError if the server dies.
    """
    port = _free_port()
    command = [vllm_command(), "serve", str(shape.model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", SERVED_NAME]
    command += ["--disable-uvicorn-access-log", *flags_of(shape.arguments())]
    command += system.serve_arguments()
    with log.open("w", encoding="utf-8") as output:
        plugins = log.parent / "plugins"
        process = _start(command, output, plugin_environment(plugins, shape.pace))
        try:
            server = Server(f"http://127.0.0.1:{port}", shape.model, process.pid, plugins)
            _wait_until_ready(process, server, log)
            yield server
        finally:
            _stop(process)


def _start(
    command: Sequence[str], output: IO[str], variables: Mapping[str, str]
) -> subprocess.Popen[str]:
    # A session of its own, so that stopping reaches the engine process too.
    return subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment() | _SERVER_ENVIRONMENT | variables,
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
