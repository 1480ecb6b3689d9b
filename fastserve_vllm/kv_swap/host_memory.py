"""Private host memory for KV cache, pinned where a device copies from it by itself."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from vllm.logger import init_logger
from vllm.utils.platform_utils import is_pin_memory_available
from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

logger = init_logger(__name__)

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


class HostMemory:
    """Rows for `num_blocks` blocks in each region of several stacks.

    Memory that is not pinned is taken from the system only as rows are first written.

    Args:
        num_blocks: rows in every region.
        shapes: (regions, row bytes) of each stack.
        device: what copies from and to it.

    Attributes:
        rows: a [regions, num_blocks, row_bytes] tensor for each stack.

    Raises:
        RuntimeError: the memory is not to be had; the message says how much is.
    """

    def __init__(
        self, num_blocks: int, shapes: Sequence[tuple[int, int]], device: torch.device
    ) -> None:
        sizes = [regions * num_blocks * row_bytes for regions, row_bytes in shapes]
        self._pinned_by_us = False
        self._memory = self._allocate(sum(sizes), device)
        self.rows = [
            part.view(regions, num_blocks, row_bytes)
            for part, (regions, row_bytes) in zip(self._memory.split(sizes), shapes, strict=True)
        ]

    def _allocate(self, size: int, device: torch.device) -> torch.Tensor:
        available = available_bytes()
        if size > available:
            raise RuntimeError(_refusal(size, available, "that is more than there is"))
        try:
            return self._take(size, device)
        except (RuntimeError, MemoryError) as error:
            raise RuntimeError(_refusal(size, available, str(error))) from error

    def _take(self, size: int, device: torch.device) -> torch.Tensor:
        pin = device.type != "cpu" and is_pin_memory_available()
        if device.type != "cpu" and not pin:
            logger.warning("KV swap: host memory cannot be pinned here; copies will be slow.")
        # torch rounds pinned allocations up to a power of two: where the driver pins memory that
        # is there already, use that.
        self._pinned_by_us = pin and device.type == "cuda" and size > 0
        torch_pins = pin and not self._pinned_by_us
        memory = torch.empty(size, dtype=torch.int8, pin_memory=torch_pins)
        if self._pinned_by_us:
            pin_tensor(memory)
        return memory

    def close(self) -> None:
        """Give the memory back; nothing may copy from or to it any more. Idempotent."""
        if self._pinned_by_us:
            # Memory that is freed while pinned stays pinned, whoever gets it next.
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
        self._pinned_by_us = False
        self.rows = []
        self._memory = torch.empty(0, dtype=torch.int8)


def available_bytes() -> int:
    """Host memory that can be had without swapping to disk, a container's limit respected."""
    try:
        available = 1024 * _figures(_MEMINFO)["MemAvailable:"]
    except (OSError, KeyError):  # Not Linux: all there is.
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        # File pages that nobody has used lately count as used, but are given up on demand.
        idle = _figures(_CGROUP / "memory.stat")["inactive_file"]
    except (OSError, ValueError, KeyError):  # No control group, or none with a limit ("max").
        return available
    return max(0, min(available, limit - used + idle))


def _figures(path: Path) -> dict[str, int]:
    """A file of lines that begin with a name and a number."""
    lines = [line.split() for line in path.read_text().splitlines()]
    return {line[0]: int(line[1]) for line in lines}


def _refusal(size: int, available: int, cause: str) -> str:
    return (
        f"KV swap asks for {size} bytes of host memory for each device, {available} bytes are "
        f"available: {cause}. Lower --fastserve-config.swap_space_gib"
    )
