"""A platform for tests: vLLM's CPU platform with asynchronous scheduling left on.

The stock CPU platform turns it off because it gains nothing there; it works all the same, so the
asynchronous paths can be tested without an accelerator. Put this folder on PYTHONPATH: the
distribution metadata beside this file announces it to vLLM. With `FASTSERVE_TEST_ASYNC=0` nothing
is announced, and vLLM picks its own.
"""

import os

from vllm.platforms.cpu import CpuPlatform


class AsyncCpuPlatform(CpuPlatform):
    @classmethod
    def check_and_update_config(cls, vllm_config):
        super().check_and_update_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True


def register():
    wanted = os.environ.get("FASTSERVE_TEST_ASYNC", "1") == "1"
    return "async_cpu_platform.AsyncCpuPlatform" if wanted else None
