"""The systems that are compared, each as arguments for the same installed vLLM."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from benchmarks.workload import Request

BASELINE = "vllm-fcfs"
_STOCK = "benchmarks.virtual_schedulers.StockVirtual"
_FASTSERVE = "benchmarks.virtual_fastserve.FastServeVirtual"
_ORACLE = "benchmarks.oracle.OracleVirtual"


@dataclass(frozen=True)
class System:
    """One way to schedule.

    `engine_arguments` are keyword arguments for `vllm.LLM` in virtual time; called late, because
    they may import FastServe. `serve_arguments` are flags for `vllm serve`, None where the
    system exists in process only.
    """

    name: str
    what: str
    engine_arguments: Callable[[], dict[str, Any]]
    serve_arguments: tuple[str, ...] | None = None
    priority_of: Callable[[Request], int] = lambda _: 0


def _stock(**arguments: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"scheduler_cls": _STOCK, **arguments}


def _fastserve(scheduler: str = _FASTSERVE, **config: Any) -> Callable[[], dict[str, Any]]:
    """Arguments that select a scheduler class with FastServe's connector and configuration."""

    def arguments() -> dict[str, Any]:
        selection = importlib.import_module("fastserve_vllm.selection")
        overrides: Mapping[str, Any] = selection.engine_overrides(config)
        return {
            "scheduler_cls": scheduler,
            "kv_transfer_config": overrides["kv_transfer_config"],
        }

    return arguments


def _serve(**config: Any) -> tuple[str, ...]:
    flags = ["--scheduler", "fastserve"]
    for field, value in config.items():
        flags += [f"--fastserve-config.{field}", str(value)]
    return tuple(flags)


def _ours(name: str, what: str, **config: Any) -> System:
    return System(name, what, _fastserve(**config), _serve(**config))


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System(BASELINE, "stock vLLM, its default scheduler", _stock(), ()),
        System(
            "vllm-priority-oracle",
            "stock vLLM with policy priority, fed with the true output lengths",
            _stock(scheduling_policy="priority"),
            priority_of=attrgetter("output_tokens"),
        ),
        _ours("fastserve", "FastServe as it comes"),
        _ours("mlfq", "FastServe without skip-join", policy="mlfq"),
        _ours("fcfs", "FastServe's engine in order of arrival", policy="fcfs"),
        _ours("fixed-priority", "FastServe's engine, short prompts first", policy="fixed-priority"),
        System(
            "srpt-oracle",
            "FastServe's engine, shortest true remaining length first",
            # With end-of-sequence ignored, a request's `max_tokens` is its true length, so the
            # oracle needs no channel of its own.
            _fastserve(scheduler=_ORACLE),
        ),
    )
}


def system_named(name: str) -> System:
    """Look a system up. Raises ValueError naming the known ones."""
    if name not in SYSTEMS:
        raise ValueError(f"unknown system {name!r}; known are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def check_runnable(name: str) -> None:
    """Find out before the first run whether a system's scheduler is there.

    Raises ValueError for an unknown system and ModuleNotFoundError for a missing module.
    """
    scheduler: str = system_named(name).engine_arguments()["scheduler_cls"]
    module, _, _ = scheduler.rpartition(".")
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{name} needs {module}", name=module)


def check_servable(name: str) -> None:
    """Raise ValueError for a system that is unknown or has no command line."""
    if system_named(name).serve_arguments is None:
        raise ValueError(f"{name} runs in process only")
