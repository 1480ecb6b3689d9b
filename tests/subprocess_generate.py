"""Runs `generate.py` in a process of its own, on the test-only platform."""

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent / "support"


def generate(model, *arguments, poison=False, asynchronous=True, fail=0):
    """What `generate.py` prints.

    Args:
        model: path of a model folder.
        arguments: its command line.
        poison: ruin device blocks before they are filled from the host.
        asynchronous: overlap steps, where the engine allows it.
        fail: let every so manieth copy fail; 0: none.

    Raises:
        RuntimeError: it prints no result; with the end of what it wrote to standard error.
    """
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "FASTSERVE_TEST_ASYNC": str(int(asynchronous))}
    env["FASTSERVE_TEST_FAIL"] = str(fail)
    if poison:
        env["FASTSERVE_TEST_POISON"] = "1"
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "generate.py"), str(model), *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(lines[-1].removeprefix("RESULT "))
