"""Work in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

from benchmarks.engine import prepare_environment

Argument = TypeVar("Argument")
Result = TypeVar("Result")


# What takes most of an engine's start. Nothing of it starts a thread or touches a device.
_PRELOADED = ["vllm", "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker"]


def in_fresh_process(
    task: Callable[[Argument], Result], argument: Argument, *, preloaded: bool = False
) -> Result:
    """Run a task in a process that has run nothing before, and nothing after.

    Systems then share no state and no memory that one leaks. With `preloaded`, it is forked from a
    process that has imported vLLM and done nothing else: many short points start sooner.
    """
    prepare_environment()
    context = multiprocessing.get_context("forkserver" if preloaded else "spawn")
    if preloaded:
        context.set_forkserver_preload(_PRELOADED)
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        return executor.submit(task, argument).result()


def each_in_fresh_process(
    task: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    jobs: int,
    *,
    preloaded: bool = False,
) -> Iterator[Result]:
    """Results in order; `jobs` processes at the same time."""

    def run(argument: Argument) -> Result:
        return in_fresh_process(task, argument, preloaded=preloaded)

    with ThreadPoolExecutor(max_workers=jobs) as threads:
        yield from threads.map(run, arguments)


def platform_is_cuda_alike(_: None = None) -> bool:
    """Whether vLLM finds a CUDA or ROCm device. Imports vLLM: run it in a process of its own."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda_alike())
