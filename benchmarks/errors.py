"""Errors that a command reports in one line."""

from fastserve_vllm.traces import InputError

__all__ = ["InputError"]
