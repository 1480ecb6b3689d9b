"""The worker's side of KV swap: owns host memory, and copies what the scheduler says.

It learns block ids and transfer ids, never requests.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from fastserve_vllm.kv_swap.copies import (
    BlockRows,
    CopyEngine,
    Finished,
    SynchronousCopies,
    ThreadCopies,
    share_blocks,
)
from fastserve_vllm.kv_swap.host_memory import HostMemory
from fastserve_vllm.kv_swap.layout import (
    block_bytes,
    host_block_count,
    refuse_unsupported,
    stacks,
)
from fastserve_vllm.kv_swap.metadata import SwapMetadata
from fastserve_vllm.kv_swap.streams import StreamCopies
from fastserve_vllm.kv_swap.transfers import Direction, Report, Transfer

__all__ = ["SwapWorker", "block_bytes", "host_block_count", "refuse_unsupported"]

logger = init_logger(__name__)


class SwapWorker:
    """Copies blocks between one worker's shard of the KV cache and its host memory.

    Every step calls `begin` before anything else, `submit` before what it computes where urgent
    transfers come in and after it elsewhere, and then `take_report`. A step without transfers, with
    none in flight, costs nothing to speak of.

    Args:
        vllm_config: vLLM's.
        kv_cache_config: this rank's.
        swap_space_bytes: host memory to use on this rank.

    Attributes:
        synchronous: copy while the caller waits, on any device: for a run that must not depend on
            how fast a thread is.
        host_blocks: blocks that the host memory holds.
        stall_s: seconds after which a copy that has not finished never will: vLLM's own limit for
            a step's answer.

    Raises:
        ConfigError: the KV cache cannot be swapped, or not one block of it fits.
    """

    synchronous = False

    def __init__(
        self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, swap_space_bytes: int
    ) -> None:
        refuse_unsupported(kv_cache_config)
        self._kv_cache_config = kv_cache_config
        self._rank = vllm_config.parallel_config.rank
        self._pipeline = vllm_config.parallel_config.pipeline_parallel_size > 1
        self.host_blocks = host_block_count(vllm_config, kv_cache_config, swap_space_bytes)
        self._memory: HostMemory | None = None
        self._engine: CopyEngine = SynchronousCopies(BlockRows((), ()))
        self.stall_s = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
        self._pending: list[Transfer] = []
        # When each transfer that has not finished was submitted, oldest first.
        self._submitted_s: dict[int, float] = {}
        self._after: Any = None
        self._report: Report | None = None
        self._logged: set[str] = set()

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the host memory and start the copy engine.

        Args:
            kv_caches: tensors of this rank's layers, by name.

        Raises:
            RuntimeError: the host memory is not to be had, with what was asked and what there is.
        """
        self.shutdown()
        if self._pipeline:
            # Stages may differ by more than their layers; the scheduler counts as the first does.
            self.host_blocks = get_pp_group().broadcast_object(self.host_blocks, src=0)
        placed = stacks(self._kv_cache_config)
        device_rows = [s.rows(kv_caches, self._kv_cache_config.num_blocks) for s in placed]
        device = device_rows[0].device if device_rows else torch.device("cpu")
        shapes = [(stack.regions, stack.row_bytes) for stack in placed]
        self._memory = HostMemory(self.host_blocks, shapes, device)
        self._engine = self._make_engine(BlockRows(device_rows, self._memory.rows), device)
        logger.info(
            "KV swap: %d host blocks (%.2f GiB) for %s",
            self.host_blocks,
            self.host_blocks * sum(stack.block_bytes for stack in placed) / (1 << 30),
            device,
        )

    def _make_engine(self, rows: BlockRows, device: torch.device) -> CopyEngine:
        if self.synchronous:
            return SynchronousCopies(rows)
        if device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream"):
            return StreamCopies(rows, device)
        return ThreadCopies(rows)

    def begin(self, metadata: SwapMetadata) -> None:
        """Open a step, before it touches any block: urgent copies out are ordered before it."""
        if self._pending:
            self.submit()  # A step that ended early left them behind.
        if metadata.flush and self._engine.busy:
            start = time.perf_counter()
            self.drain()
            self._reporting().waited_s += time.perf_counter() - start
        if metadata.transfers:
            self._begin(metadata.transfers)

    def _begin(self, transfers: tuple[Transfer, ...]) -> None:
        for transfer in transfers:
            if not transfer.urgent or transfer.direction is Direction.IN:
                self._pending.append(transfer)
                continue
            if any(share_blocks(transfer, earlier) for earlier in self._pending):
                self.submit()
            self._submit(transfer)
        if self._pending and not any(transfer.urgent for transfer in self._pending):
            # Their blocks are none of this step's business: they wait for earlier ones only.
            self._after = self._engine.mark()
            if self._engine.submits_early:
                self.submit()

    def submit(self) -> None:
        """Start the step's other transfers; urgent copies in are ordered before what follows."""
        if self._pending:
            for transfer in self._pending:
                self._submit(transfer, self._after)
            self._pending.clear()
            self._after = None

    def _submit(self, transfer: Transfer, after: Any = None) -> None:
        self._submitted_s[transfer.transfer_id] = time.perf_counter()
        self._engine.submit(transfer, after)

    def take_report(self) -> Report | None:
        """What has finished since the last call; None: nothing.

        Raises:
            RuntimeError: a copy has stalled.
        """
        self._poll()
        report, self._report = self._report, None
        return report

    def drain(self) -> None:
        """Wait for everything in flight; the step's report then tells of it."""
        self._engine.wait()

    def shutdown(self) -> None:
        """Finish what is in flight and give the host memory back. Idempotent."""
        self._engine.close()
        self._engine = SynchronousCopies(BlockRows((), ()))
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _poll(self) -> None:
        if self._engine.busy:
            for finished in self._engine.poll():
                self._note(finished)
            self._check_stalled()

    def _check_stalled(self) -> None:
        """A request whose copy never ends would wait for ever: end the engine instead.

        Steps that need not wait for the copy go on, so vLLM's own limit does not notice.
        """
        for transfer_id, submitted_s in self._submitted_s.items():
            waited_s = time.perf_counter() - submitted_s
            if waited_s > self.stall_s:
                raise RuntimeError(
                    f"KV swap: copy {transfer_id} has not finished for {waited_s:.0f} s, longer "
                    f"than VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS ({self.stall_s:.0f} s)"
                )
            return

    def _note(self, finished: Finished) -> None:
        transfer, report = finished.transfer, self._reporting()
        report.done[transfer.transfer_id] = 1
        self._submitted_s.pop(transfer.transfer_id, None)
        report.waited_s += finished.waited_s
        if finished.cause is not None:
            self._note_failure(transfer, finished.cause, report)
            return
        way = transfer.direction.value
        key = f"{self._rank},{way}"
        report.copies[key] = report.copies.get(key, 0) + 1
        report.copied_bytes[way] = report.copied_bytes.get(way, 0) + finished.copied_bytes
        report.copy_s[way] = report.copy_s.get(way, 0.0) + finished.copy_s

    def _reporting(self) -> Report:
        if self._report is None:
            self._report = Report()
        return self._report

    def _note_failure(self, transfer: Transfer, cause: str, report: Report) -> None:
        report.failed[transfer.transfer_id] = cause
        if cause not in self._logged:
            self._logged.add(cause)
            logger.error("KV swap: a copy %s failed: %s", transfer.direction.value, cause)
