"""Points at the same time, each on its own share of the processor's cores.

A machine that others use, too, is a tenth slower at one time than at another, and near capacity
that is half of the latency. What two systems do at the same time, on one core each, is the same
machine's doing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from benchmarks.errors import InputError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def core_shares(count: int) -> list[set[int]]:
    """The cores that this process may use, in so many equal shares; a rest stays idle.

    Raises InputError where there are not enough, or where cores cannot be given to a process.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("--side-by-side needs a system that gives cores to processes, as Linux")
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // count
    if not size:
        raise InputError(f"--side-by-side: {count} systems need as many cores, got {len(cores)}")
    return [set(cores[i * size : (i + 1) * size]) for i in range(count)]


def each_side_by_side(
    task: Callable[[Argument], Result], arguments: Sequence[Argument]
) -> list[Result]:
    """Run a task for all arguments at the same time: the first one on the first share, and so on.

    What a task starts, threads and processes, inherits its share.
    """

    def on_share(argument: Argument, share: set[int]) -> Result:
        # Of the calling thread alone.
        os.sched_setaffinity(0, share)
        return task(argument)

    with ThreadPoolExecutor(max_workers=len(arguments)) as threads:
        return list(threads.map(on_share, arguments, core_shares(len(arguments))))
