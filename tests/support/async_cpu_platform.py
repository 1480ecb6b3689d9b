"""Platforms for tests: vLLM's CPU platform with what it leaves out for want of use left in.

The stock CPU platform turns asynchronous scheduling off because it gains nothing there, and does
not say which of Ray's resources it runs on, so that vLLM refuses Ray. Both work all the same, so
these paths can be tested without an accelerator. Put this folder on PYTHONPATH: the distribution
metadata beside this file announces the platform to vLLM.

`FASTSERVE_TEST_ASYNC=0` leaves asynchronous scheduling off; then nothing is announced and vLLM
picks its own platform, unless `FASTSERVE_TEST_RAY=1` asks for one that Ray can run.
"""

import os

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    # A local Ray node declares as many of these as the test needs.
    ray_device_key = "GPU"


class AsyncCpuPlatform(RayCpuPlatform):
    @classmethod
    def check_and_update_config(cls, vllm_config):
        super().check_and_update_config(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True


def register():
    if os.environ.get("FASTSERVE_TEST_ASYNC", "1") == "1":
        return "async_cpu_platform.AsyncCpuPlatform"
    if os.environ.get("FASTSERVE_TEST_RAY") == "1":
        return "async_cpu_platform.RayCpuPlatform"
    return None
