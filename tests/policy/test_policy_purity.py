"""The pure modules import neither vLLM nor torch nor prometheus_client."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastserve_vllm

PACKAGE = Path(fastserve_vllm.__file__).parent
POLICY = sorted(f"fastserve_vllm.policy.{path.stem}" for path in PACKAGE.glob("policy/[a-z]*.py"))
SIMULATOR = sorted(
    f"fastserve_vllm.simulator.{path.stem}" for path in PACKAGE.glob("simulator/[a-z]*.py")
)
KV_SWAP = [
    "fastserve_vllm.kv_swap.counters",
    "fastserve_vllm.kv_swap.host_copy",
    "fastserve_vllm.kv_swap.host_pool",
    "fastserve_vllm.kv_swap.in_flight",
    "fastserve_vllm.kv_swap.manager",
    "fastserve_vllm.kv_swap.outbound",
    "fastserve_vllm.kv_swap.swap_plan",
    "fastserve_vllm.kv_swap.transfers",
]
TRACE = sorted(f"fastserve_vllm.trace.{path.stem}" for path in PACKAGE.glob("trace/[a-z]*.py"))
PURE = [
    "fastserve_vllm",
    "fastserve_vllm.config",
    "fastserve_vllm.metrics",
    *KV_SWAP,
    *POLICY,
    *SIMULATOR,
    *TRACE,
    "fastserve_vllm.traces",
    "fastserve_vllm.workloads",
]

BLOCKED = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"vllm", "torch", "prometheus_client"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def run(program: str) -> str:
    """What the program prints in a fresh interpreter."""
    command = [sys.executable, "-c", program]
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_pure_modules_import_without_the_host():
    """Every pure module imports where vLLM, torch and prometheus_client do not."""
    imports = "\n".join(f"import {name}" for name in PURE)
    run(f"{BLOCKED}\n{imports}\nfrom fastserve_vllm import FastServeConfig")


def test_the_block_blocks():
    """The test above would notice an import."""
    with pytest.raises(AssertionError, match="torch is blocked"):
        run(f"{BLOCKED}\nimport torch")


def test_the_policy_needs_the_standard_library_only():
    """All policy modules but `make`, which reads the configuration, import nothing else."""
    imports = "\n".join(f"import {name}" for name in POLICY if not name.endswith(".make"))
    loaded = run(f"{imports}\nimport sys\nprint(*sys.modules)").split()
    outside = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    startup = {name.partition(".")[0] for name in run("import sys; print(*sys.modules)").split()}
    assert outside - startup == {"fastserve_vllm"}
