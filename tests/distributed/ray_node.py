"""A Ray node of this machine's own that claims to have GPUs."""

import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from serving import free_port

START_TIMEOUT_S = 120


@contextmanager
def ray_node(env, gpus):
    """A node for the length of the block; yields its address.

    It runs in the foreground of a process of ours, so that it ends alone: `ray stop` would end
    every Ray process of the machine.

    Args:
        env: environment of the node, and of the workers that it starts.
        gpus: how many to claim.

    Raises:
        RuntimeError: it does not start.
    """
    port = free_port()
    # Ray's sockets lie in this folder, and the path of a socket is limited to 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block"]
        command += ["--node-ip-address", "127.0.0.1", "--port", str(port), "--temp-dir", folder]
        command += ["--num-gpus", str(gpus), "--num-cpus", str(gpus), "--disable-usage-stats"]
        command += ["--include-dashboard", "false", "--object-store-memory", "100000000"]
        log = Path(folder) / "node.log"
        with log.open("w") as output:
            node = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            _wait_until_up(node, log)
            yield f"127.0.0.1:{port}"
        finally:
            node.terminate()
            node.wait(60)


def _wait_until_up(node, log):
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        if node.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no Ray node: {log.read_text()[-2000:]}")
        time.sleep(0.2)
