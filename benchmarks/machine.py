"""What else went on in the machine while something was measured: on a shared one, trust less."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

_PROBE_PERIOD_S = 0.25
_PROBE_LOOPS = 3000


class Interference:
    """Watches processes from when it is made.

    Args:
        processes: ids of those that are measured.
    """

    def __init__(self, processes: Iterable[int]) -> None:
        self._processes = tuple(processes)
        self._began_s = time.perf_counter()
        self._delay_s = self._run_delay_s()
        self._pressure_s = _cpu_pressure_s()

    def figures(self) -> dict[str, float]:
        """Shares of the time since then; nothing where the kernel does not tell.

        `run_delay_share`: the main threads of the processes were ready to run and had no core,
        summed over processes. `cpu_pressure_share`: any process of the machine was.
        """
        took_s = time.perf_counter() - self._began_s
        delay_s, pressure_s = self._run_delay_s(), _cpu_pressure_s()
        figures = {}
        if delay_s is not None and self._delay_s is not None:
            figures["run_delay_share"] = (delay_s - self._delay_s) / took_s
        if pressure_s is not None and self._pressure_s is not None:
            figures["cpu_pressure_share"] = (pressure_s - self._pressure_s) / took_s
        return figures

    def _run_delay_s(self) -> float | None:
        try:
            return sum(_run_delay_s(process) for process in self._processes)
        except (OSError, ValueError, IndexError):
            return None


class SpeedProbe:
    """Times the same small loop four times a second while it is entered, in a thread of its own.

    In processor time, so that waiting for a core does not count: what differs between two
    measurements is how fast the cores were, which neighbours on the same hardware decide, too.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def figures(self) -> dict[str, float]:
        """`loop_us`: what the loop took, median."""
        return {"loop_us": 1e6 * statistics.median(self._seconds)}

    def _run(self) -> None:
        while True:
            started = time.thread_time()
            sum(range(_PROBE_LOOPS))
            self._seconds.append(time.thread_time() - started)
            if self._over.wait(_PROBE_PERIOD_S):
                return


def processes_of_session(session: int) -> list[int]:
    """Ids of the processes of a session: of its leader and of what that started."""
    processes = (int(entry.name) for entry in Path("/proc").glob("[0-9]*"))
    return [process for process in processes if _session_of(process) == session]


def _session_of(process: int) -> int | None:
    try:
        return os.getsid(process)
    except OSError:  # gone meanwhile
        return None


def _run_delay_s(process: int) -> float:
    """Seconds that a process's main thread has waited for a core."""
    return int(Path(f"/proc/{process}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def _cpu_pressure_s() -> float | None:
    """Seconds in which some process of the machine waited for a core."""
    try:
        line = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()[0]
    except (OSError, IndexError):
        return None
    return int(line.rpartition("total=")[2]) / 1e6
