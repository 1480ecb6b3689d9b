"""Runs vLLM's own scheduler tests with FastServe's scheduler in the place of vLLM's.

    make host-tests HOST_ARGS="TEST ... --versions 0.32.0 0.33.0"

Three runs a version: stock, `default` (as users get it) and `bare` (arrival order, no connector of
ours; see `plugin.py`). A test that passes stock has to pass with FastServe, or to be listed in
`expected.toml` with the reason; one that is listed and passes is reported, too.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import tomllib
from vllm_suite.fetch import torchvision, vllm_tests
from vllm_suite.models import write_models

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
CACHE = ROOT / ".vllm-tests"
OVERLAYS = {"0.32.0": None, "0.33.0": ROOT / ".vllm-0.33" / "overlay"}
TORCHVISION = "0.28.0"
SUITE = "tests/v1/core"
MODES = ("stock", "default", "bare")


def run_tests(version, mode, tests):
    """What became of each test: `passed`, `failed` or `skipped`, by node id."""
    folder = vllm_tests(version, CACHE)
    write_models(folder)
    results = CACHE / f"{version}-{mode}.json"
    results.unlink(missing_ok=True)
    path = [HERE.parent, ROOT, torchvision(TORCHVISION, CACHE), OVERLAYS[version], folder]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(p) for p in path if p),
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "FASTSERVE_SUITE_RESULTS": str(results),
    }
    if mode != "stock":
        env["FASTSERVE_SUITE"] = mode
    options = ["-p", "vllm_suite.plugin", "-p", "no:cacheprovider", "-q", "-W", "ignore"]
    options += ["--continue-on-collection-errors", "--tb=short", f"--rootdir={folder}"]
    command = [sys.executable, "-m", "pytest", *options, "-c", os.devnull, *tests]
    with (CACHE / f"{version}-{mode}.log").open("w") as log:
        subprocess.run(command, cwd=folder, env=env, check=False, stdout=log, stderr=log)
    if not results.is_file():
        sys.exit(f"the tests did not run; see {log.name}")
    return json.loads(results.read_text())


def expected_differences():
    """{test without parameters: (reason, whether it passes bare)}, from `expected.toml`."""
    table = tomllib.loads((HERE / "expected.toml").read_text())
    return {
        f"{SUITE}/{group['file']}::{test}": (group["reason"], group["bare"])
        for group in table.get("group", ())
        for test in group["tests"]
    }


def judge(outcomes, expected):
    """Lines that say what is not as expected.

    Args:
        outcomes: results by mode.
        expected: as from `expected_differences`.
    """
    wrong, differing = [], set()
    for test in sorted(t for t, outcome in outcomes["stock"].items() if outcome == "passed"):
        name = test.partition("[")[0]
        default, bare = (outcomes[mode].get(test, "missing") for mode in ("default", "bare"))
        if "passed" == default == bare:
            continue
        differing.add(name)
        if name not in expected:
            wrong.append(f"{test}: default {default}, bare {bare}, and not listed")
        elif expected[name][1] and bare != "passed":
            wrong.append(f"{test}: listed as passing bare, but {bare}")
    ran = {test.partition("[")[0] for test in outcomes["stock"]}
    wrong += [f"{name}: listed, but it passes" for name in expected if name in ran - differing]
    return wrong


def main():
    parser = argparse.ArgumentParser(description="vLLM's scheduler tests on FastServe's scheduler.")
    parser.add_argument("--versions", nargs="+", default=list(OVERLAYS), choices=list(OVERLAYS))
    parser.add_argument("tests", nargs="*", default=[SUITE])
    options = parser.parse_args()
    failed = False
    for version in options.versions:
        outcomes = {mode: run_tests(version, mode, options.tests) for mode in MODES}
        for mode, found in outcomes.items():
            stock = [t for t, outcome in outcomes["stock"].items() if outcome == "passed"]
            among = Counter(found.get(test, "missing") for test in stock)
            print(f"{version} {mode}: {dict(Counter(found.values()))}; of stock's: {dict(among)}")
        wrong = judge(outcomes, expected_differences())
        print("\n".join(wrong) or f"{version}: as expected", flush=True)
        failed |= bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
