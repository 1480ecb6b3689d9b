"""A Prometheus that scrapes a live server, and load for that server."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.dashboards.alerts import rules, scrape_config


@dataclass(frozen=True)
class Prometheus:
    """One that runs; its HTTP API."""

    url: str

    def query(self, expr: str) -> list[dict[str, Any]]:
        """Series of an instant query; raises urllib.error.HTTPError where it is not PromQL."""
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return found

    def get(self, path: str, **arguments: str) -> Any:
        """Data of an API call."""
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(address, timeout=10) as response:
            return json.load(response)["data"]


def binary() -> str | None:
    """Path of Prometheus; None: it is not installed (Debian's package is `prometheus`)."""
    return shutil.which("prometheus")


@contextmanager
def running_prometheus(
    target: str, folder: Path, port: int, every: str = "1s"
) -> Iterator[Prometheus]:
    """Prometheus with the generated configuration, scraping `target` (host:port) more often."""
    config = scrape_config()
    config["global"] = {"scrape_interval": every, "evaluation_interval": every}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "alerts.yml").write_text(yaml.safe_dump(rules()))
    command = [
        str(binary()),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _ready(process, f"http://127.0.0.1:{port}", folder / "prometheus.log")
    finally:
        process.terminate()
        process.wait(20)


def _ready(process: subprocess.Popen[bytes], url: str, log: Path) -> Prometheus:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=2):
            return Prometheus(url)
        time.sleep(0.1)
    raise RuntimeError(f"Prometheus did not start: {log.read_text()}")


class Load:
    """Requests of mixed lengths from many clients at once; a client ends with its first error.

    Args:
        url: the server.
        model: its name there.
        clients: how many ask at a time.
        tokens: most tokens of a prompt and of an answer.
    """

    def __init__(self, url: str, model: str, clients: int, tokens: tuple[int, int]) -> None:
        self._url = f"{url}/v1/completions"
        self._model = model
        self._tokens = tokens
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._client, args=(seed,), daemon=True)
            for seed in range(clients)
        ]
        self.ids: list[str] = []
        self.errors: list[str] = []

    @property
    def served(self) -> int:
        """Requests that were answered."""
        return len(self.ids)

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask nothing more, and wait for the answers."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not self._stopping.is_set():
                self._ask(rng)
        except OSError as error:
            self.errors.append(str(error))

    def _ask(self, rng: random.Random) -> None:
        prompt, tokens = (rng.randint(most // 8, most) for most in self._tokens)
        body = {
            "model": self._model,
            "prompt": [rng.randint(10, 200) for _ in range(prompt)],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
        with self._lock:
            self.ids.append(answer["id"])
