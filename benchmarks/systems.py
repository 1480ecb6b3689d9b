"""The systems that are compared, each as arguments for the same installed vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from benchmarks.errors import InputError
from benchmarks.workload import Request

BASELINE = "vllm-fcfs"
# GiB of host memory for vLLM's own KV offloading: as much as FastServe's `swap_space_gib`.
OFFLOAD_GIB = 4.0


@dataclass(frozen=True)
class System:
    """One way to schedule.

    Attributes:
        name: as the command line names it.
        what: one line about it.
        arguments: engine arguments of vLLM's own.
        fastserve: FastServe's configuration; None: FastServe is not selected.
        oracle: what true output lengths decide, which no client can send: each request's
            priority, or FastServe's policy.
    """

    name: str
    what: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    fastserve: Mapping[str, Any] | None = None
    oracle: Literal["priority", "policy"] | None = None

    def priority_of(self, request: Request) -> int:
        """The priority to submit a request with; low values go first."""
        return request.output_tokens if self.oracle == "priority" else 0

    def configured(self, fastserve: Mapping[str, Any]) -> System:
        """This system with further FastServe configuration; stock systems ignore it."""
        if self.fastserve is None:
            return self
        return replace(self, fastserve={**fastserve, **self.fastserve})

    def engine_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `vllm.LLM`."""
        if self.fastserve is None:
            return dict(self.arguments)
        from fastserve_vllm.selection import engine_overrides

        return {**self.arguments, **engine_overrides(self.fastserve)}

    def serve_arguments(self) -> list[str]:
        """Flags for `vllm serve`. Raises InputError where the system has none."""
        if self.oracle is not None:
            raise InputError(f"{self.name} runs in process only: no client sends true lengths")
        flags = [word for name, value in self.arguments.items() for word in _flag(name, value)]
        if self.fastserve is not None:
            flags += ["--scheduler", "fastserve"]
            flags += ["--fastserve-config", json.dumps(dict(self.fastserve))]
        return flags


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, json.dumps(value) if isinstance(value, Mapping) else str(value)]


def flags_of(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as flags of `vllm serve`."""
    return [word for name, value in arguments.items() for word in _flag(name, value)]


SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System(BASELINE, "stock vLLM, its default scheduler"),
        System(
            "vllm-fcfs+offload",
            "stock vLLM with its own offloading of KV cache to host memory",
            {"kv_offloading_size": OFFLOAD_GIB},
        ),
        System(
            "vllm-priority-oracle",
            "stock vLLM with policy priority, fed with the true output lengths",
            {"scheduling_policy": "priority"},
            oracle="priority",
        ),
        System("mlfq", "FastServe without skip-join", fastserve={"policy": "mlfq"}),
        System("fastserve", "FastServe as it comes", fastserve={}),
        System(
            "fastserve-smooth",
            "FastServe, the gap between two tokens bounded for everybody",
            fastserve={"objective": "smooth"},
        ),
        System(
            "fastserve-paper",
            "FastServe as the paper has it: endless ladder, absolute ageing",
            fastserve={"objective": "paper"},
        ),
        System(
            "fastserve-reactive",
            "FastServe, KV cache swapped only when room is needed at once",
            fastserve={"swap_mode": "reactive"},
        ),
        System(
            "fastserve-recompute",
            "FastServe, KV cache given up and computed again",
            fastserve={"swap_mode": "recompute"},
        ),
        System("fcfs", "FastServe's engine in order of arrival", fastserve={"policy": "fcfs"}),
        System(
            "fixed-priority",
            "FastServe's engine, short prompts first",
            fastserve={"policy": "fixed-priority"},
        ),
        # With end-of-sequence ignored, a request's `max_tokens` is its true length, so this
        # oracle needs no channel of its own.
        System(
            "srpt-oracle",
            "FastServe's engine, shortest true remaining length first",
            fastserve={"policy": "fcfs"},
            oracle="policy",
        ),
        System("vllm-fcfs-again", "stock vLLM once more: the noise of what is measured"),
    )
}


def system_named(name: str) -> System:
    """Look a system up. Raises InputError naming the known ones."""
    if name not in SYSTEMS:
        raise InputError(f"unknown system {name!r}; known are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


def check_runnable(system: System, *, http: bool, is_cuda_alike: Callable[[], bool]) -> None:
    """Find out before the first run whether a system can run here; InputError says why not."""
    if http:
        system.serve_arguments()
    if system.fastserve is not None:
        from fastserve_vllm.config import FastServeConfig

        try:
            FastServeConfig.parse(system.fastserve)
        except ValueError as error:
            raise InputError(f"{system.name}: {error}") from None
    if "kv_offloading_size" in system.arguments and not is_cuda_alike():
        raise InputError(
            f"{system.name} needs a GPU: vLLM's own KV offloading does not run on this platform"
        )
