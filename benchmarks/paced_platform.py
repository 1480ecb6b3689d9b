"""vLLM's CPU platform, with what an accelerator's has: paced steps, scheduled one ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class PacedPlatform(CpuPlatform):
    """The CPU platform whose worker is `PacedWorker`."""

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Choose the worker; keep asynchronous scheduling, which the CPU platform turns off."""
        super().check_and_update_config(vllm_config)
        vllm_config.parallel_config.worker_cls = "benchmarks.paced_worker.PacedWorker"
        vllm_config.scheduler_config.async_scheduling = True
