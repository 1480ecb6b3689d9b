"""A server that runs short of memory, load for it, and Prometheus, until interrupted.

python -m scripts.dashboards.demo MODEL [VLLM_SERVE_ARGUMENT...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from scripts.dashboards.files import ROOT
from scripts.dashboards.live import Load, binary, running_prometheus

_PROMETHEUS_PORT = 9090
_SMALL = ["--max-num-seqs", "6", "--num-gpu-blocks-override", "80"]
_SMALL += ["--max-model-len", "1024", "--block-size", "32"]


def main() -> int:
    """Start everything, say where to look, and clean up."""
    if binary() is None:
        print("Prometheus is not installed; on Debian: apt-get install prometheus", file=sys.stderr)
        return 1
    model, port = sys.argv[1], os.environ.get("PORT", "8000")
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        server = _server(model, port, trace, sys.argv[2:])
        try:
            _wait_for(server, f"http://127.0.0.1:{port}/health")
            _show(port, Path(folder), model, trace)
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait(60)
    return 0


def _server(model: str, port: str, trace: Path, more: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    command += ["--host", "127.0.0.1", "--port", port, "--scheduler", "fastserve"]
    command += ["--fastserve-config.trace_file", str(trace), "--enforce-eager", *_SMALL]
    command += ["--kv-cache-memory-bytes", "64M", *more]
    log = trace.with_name("server.log").open("w")
    print(f"demo: starting the server, log in {log.name}", flush=True)
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def _wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    while server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise SystemExit("demo: the server ended; see its log")


def _show(port: str, folder: Path, model: str, trace: Path) -> None:
    url = f"http://127.0.0.1:{port}"
    load = Load(url, model, 24, (400, 400))
    with running_prometheus(f"127.0.0.1:{port}", folder, _PROMETHEUS_PORT) as prometheus:
        load.start()
        print(
            f"""demo: {url} serves 24 clients; KV cache swaps. Interrupt to end. Look at:
  {prometheus.url}/graph?g0.expr=vllm:fastserve_level_jobs&g0.tab=0   any figure, drawn
  {prometheus.url}/alerts                                             the alert rules
  fastserve top --url {url}
  fastserve timeline {trace} -o page.html
  Grafana, if there is one: import examples/grafana/dashboard.json, data source {prometheus.url}""",
            flush=True,
        )
        try:
            while True:
                time.sleep(3600)
        finally:
            load.stop()


if __name__ == "__main__":
    sys.exit(main())
