"""FastServe for vLLM: skip-join MLFQ scheduling with token-level preemption, as a plugin.

Importing this package imports neither vLLM nor torch; everything else is loaded on first
use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastserve_vllm.config import FastServeConfig
    from fastserve_vllm.llm import LLM, AsyncLLM
    from fastserve_vllm.selection import engine_overrides, select

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "fastserve_vllm.llm",
    "AsyncLLM": "fastserve_vllm.llm",
    "FastServeConfig": "fastserve_vllm.config",
    "engine_overrides": "fastserve_vllm.selection",
    "select": "fastserve_vllm.selection",
}

__all__ = ["LLM", "AsyncLLM", "FastServeConfig", "__version__", "engine_overrides", "select"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
