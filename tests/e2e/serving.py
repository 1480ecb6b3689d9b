"""A real `vllm serve` for tests: started, waited for, asked for its metrics, stopped."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tiny_engine import ENGINE_ARGS

START_TIMEOUT_S = 240


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    model: str
    log: Path
    process: subprocess.Popen

    def get(self, path):
        """Body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read().decode()

    def metrics(self):
        """Values of `/metrics` by name and label values, engine and model name left out."""
        values = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in _ENGINE_LABELS}
                values[(sample.name, *labels.values())] = sample.value
        return values

    def wait_for(self, *names, value=0.0, timeout_s=20):
        """Poll until metrics without labels of their own have a value.

        Raises:
            AssertionError: they had another when the time was up.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = {name: self.metrics()[(name,)] for name in names}
            if set(found.values()) == {value}:
                return
            assert time.monotonic() < deadline, f"expected {value}: {found}"
            time.sleep(0.1)


_ENGINE_LABELS = ("engine", "model_name")


@contextmanager
def serving(model, flags, env, log, start_timeout_s=START_TIMEOUT_S):
    """A server on a free port of this machine for the length of the block."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *engine_flags(), *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
    server = Server(f"http://127.0.0.1:{port}", model, log, process)
    try:
        _wait_until_ready(server, start_timeout_s)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def engine_flags():
    """The small engine, as command-line flags."""
    flags = []
    for name, value in ENGINE_ARGS.items():
        flags += [f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True)
    return flags


def _wait_until_ready(server, timeout_s):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {server.log.read_text()[-4000:]}")
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            server.get("/health")
            return
        time.sleep(0.3)
    raise RuntimeError(f"the server is not ready: {server.log.read_text()[-4000:]}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
