"""What the swap manager counts."""

from dataclasses import dataclass

from fastserve_vllm.kv_swap.swap_plan import OutPlan
from fastserve_vllm.kv_swap.transfers import Direction, Transfer


@dataclass(slots=True)
class SwapCounters:
    """What happened so far.

    Attributes:
        outs: swap-outs begun, those that had nothing to copy included.
        ins: swap-ins begun, likewise.
        urgent_outs: those of `outs` that were urgent.
        urgent_ins: those of `ins` that were.
        saves: copies in advance begun, of requests that run on.
        blocks_out: blocks sent to the host.
        blocks_in: blocks sent to the device.
        blocks_kept: blocks that a swap-out found in the request's own copy.
        blocks_shared: blocks that a swap-out found in others' copies.
        reclaimed_copies: retained copies dropped to make room.
        no_room: swap-outs declined for want of host blocks.
        failed: transfers that failed on some worker.
        first_out_blocks: blocks of requests that were swapped out for the first time.
        first_out_copied: blocks copied for that, in advance or then.
        again_out_blocks: blocks of requests that had been swapped out before.
        again_out_copied: blocks copied for that, in advance or then, since they came back.
    """

    outs: int = 0
    ins: int = 0
    urgent_outs: int = 0
    urgent_ins: int = 0
    saves: int = 0
    blocks_out: int = 0
    blocks_in: int = 0
    blocks_kept: int = 0
    blocks_shared: int = 0
    reclaimed_copies: int = 0
    no_room: int = 0
    failed: int = 0
    first_out_blocks: int = 0
    first_out_copied: int = 0
    again_out_blocks: int = 0
    again_out_copied: int = 0

    def count_out(self, plan: OutPlan, saved_blocks: int, *, again: bool, urgent: bool) -> None:
        """A swap-out was begun.

        Args:
            plan: what it does.
            saved_blocks: blocks that were copied for it in advance.
            again: the request was swapped out before.
            urgent: see `Transfer`.
        """
        self.outs += 1
        self.urgent_outs += urgent
        self.blocks_kept += plan.kept
        self.blocks_shared += len(plan.shared)
        blocks = plan.kept + len(plan.shared) + len(plan.places)
        if again:
            self.again_out_blocks += blocks
            self.again_out_copied += len(plan.places) + saved_blocks
        else:
            self.first_out_blocks += blocks
            self.first_out_copied += len(plan.places) + saved_blocks

    def count_save(self, plan: OutPlan) -> None:
        """A copy in advance was begun."""
        self.saves += 1
        self.blocks_shared += len(plan.shared)

    def count_in(self, *, urgent: bool) -> None:
        """A swap-in was begun."""
        self.ins += 1
        self.urgent_ins += urgent

    def count_sent(self, transfer: Transfer) -> None:
        """A transfer was handed to the workers."""
        if transfer.direction is Direction.OUT:
            self.blocks_out += len(transfer.device_blocks)
        else:
            self.blocks_in += len(transfer.device_blocks)
