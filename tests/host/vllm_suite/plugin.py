"""A pytest plugin for vLLM's own tests: puts FastServe's scheduler in the place of vLLM's.

`FASTSERVE_SUITE` says how: `default` as users get it, beside the test's own KV connector if it has
one; `bare` in arrival order and without a connector, so that what is left is how the class drives
vLLM. Without it vLLM's classes stay. What became of each test is written to
`FASTSERVE_SUITE_RESULTS`.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

_outcomes: dict[str, str] = {}
_RANK = ("passed", "skipped", "failed")


def pytest_configure(config):
    if wanted := os.environ.get("FASTSERVE_SUITE"):
        _substitute(bare={"default": False, "bare": True}[wanted])


def _substitute(*, bare):
    """Replace both scheduler classes in their modules, before a test module imports them.

    The contract is checked first: afterwards it would find FastServe where it looks for vLLM.
    """
    from vllm.config import KVTransferConfig
    from vllm.v1.core.sched import async_scheduler, scheduler

    import fastserve_vllm.scheduler as ours
    from fastserve_vllm import host
    from fastserve_vllm.config import FastServeConfig
    from fastserve_vllm.selection import engine_overrides

    host.check()
    host.check = lambda: None
    if bare:
        config = FastServeConfig(policy="fcfs", swap_mode="recompute")
        ours.find_connector = lambda _: SimpleNamespace(config=config)

    class Substitute(ours.FastServeScheduler):
        """Configures FastServe's connector where the test has built the configuration itself."""

        overlapping = False

        def __init__(self, *args, **kwargs):
            config = kwargs.get("vllm_config") or args[0]
            # Stock behaviour hangs on the class, FastServe's on the configuration.
            config.scheduler_config.async_scheduling = self.overlapping
            if not bare:
                overrides = engine_overrides(None, config.kv_transfer_config)
                config.kv_transfer_config = KVTransferConfig(**overrides["kv_transfer_config"])
            super().__init__(*args, **kwargs)

    class AsyncSubstitute(Substitute):
        overlapping = True

    scheduler.Scheduler = Substitute
    async_scheduler.AsyncScheduler = AsyncSubstitute


def pytest_runtest_logreport(report):
    before = _outcomes.get(report.nodeid, "passed")
    _outcomes[report.nodeid] = max(before, report.outcome, key=_RANK.index)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    if path := os.environ.get("FASTSERVE_SUITE_RESULTS"):
        Path(path).write_text(json.dumps(_outcomes, indent=1) + "\n")
