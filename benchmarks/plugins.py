"""What a measured server loads besides FastServe: plugins of vLLM's own kind, nothing installed."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import pace

_METADATA = "Metadata-Version: 2.1\nName: fastserve-benchmark\nVersion: 0\n"
_USED_POOL = "[vllm.general_plugins]\nused_pool = benchmarks.used_pool:install\n"
_PACED = "[vllm.platform_plugins]\npaced = benchmarks.pace:platform\n"


def plugin_environment(folder: Path, times: float | None) -> dict[str, str]:
    """Variables with which vLLM's processes find the plugins that are announced in `folder`.

    Args:
        folder: for the announcement, and what the pace reports; a server's own.
        times: the pace of steps; None: as fast as the machine computes them.
    """
    announced = folder / "fastserve_benchmark-0.dist-info"
    announced.mkdir(parents=True, exist_ok=True)
    (announced / "METADATA").write_text(_METADATA, encoding="utf-8")
    entry_points = _USED_POOL if times is None else _USED_POOL + _PACED
    (announced / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    root = Path(__file__).parent.parent
    paths = [str(folder.resolve()), str(root), os.environ.get("PYTHONPATH", "")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return found if times is None else found | pace.variables(times, folder)
