"""What an engine logs about its scheduler when it starts."""

from logging import Logger
from typing import TYPE_CHECKING

from fastserve_vllm.policy.make import describe as describe_policy

if TYPE_CHECKING:
    from fastserve_vllm.scheduler import FastServeScheduler


def describe(scheduler: "FastServeScheduler") -> str:
    """One line: policy, ladder, batch limit, device and host blocks, swap mode, model runner."""
    config = scheduler.fastserve_config
    swap = "no KV swap"
    if scheduler.exchange is not None:
        swap = f"{config.swap_mode} KV swap to {scheduler.exchange.host_blocks} host blocks"
    return (
        f"policy {config.policy}, {describe_policy(scheduler.planner.policy, config)}, batch limit "
        f"{scheduler.max_num_active_reqs}, {scheduler.kv_cache_config.num_blocks} device blocks, "
        f"{swap}, model runner {'V2' if scheduler.use_v2_model_runner else 'V1'}"
    )


def warn_of_slots(scheduler: "FastServeScheduler", logger: Logger) -> None:
    """Say so where the model runner has no slot left for whoever is paused."""
    if scheduler.use_v2_model_runner and (
        scheduler.max_num_active_reqs == scheduler.max_num_running_reqs
    ):
        logger.warning(
            "FastServe: the V2 model runner keeps one of --max-num-seqs %d slots for each paused "
            "request, and the batch may take them all: preemption will recompute. Set "
            "--max-num-active-seqs below --max-num-seqs to leave room for paused requests.",
            scheduler.max_num_running_reqs,
        )
