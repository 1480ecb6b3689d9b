"""How large the simulated engine is, and how fast."""

import math
from dataclasses import dataclass

from fastserve_vllm.policy.step_time import StepTimeModel


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The engine that is simulated.

    Attributes:
        batch_limit: most requests in a step.
        token_budget: most tokens in a step; a longer prompt is prefilled in chunks.
        device_blocks, block_tokens: KV blocks of the device, and tokens that one holds.
        host_blocks: KV blocks of the host.
        step_time: what steps really take.
        block_copy_s: seconds that a channel takes to copy a block.
    """

    batch_limit: int
    token_budget: int
    device_blocks: int
    block_tokens: int
    host_blocks: int
    step_time: StepTimeModel
    block_copy_s: float

    def __post_init__(self) -> None:
        for name in ("batch_limit", "token_budget", "device_blocks", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.host_blocks < 0:
            raise ValueError(f"host_blocks must be at least 0, got {self.host_blocks}")
        if not (math.isfinite(self.block_copy_s) and self.block_copy_s >= 0):
            raise ValueError(f"block_copy_s must be finite and at least 0, got {self.block_copy_s}")
