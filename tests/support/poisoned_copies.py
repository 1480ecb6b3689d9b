"""A swap worker for tests that ruins device blocks before they are filled from the host.

With `FASTSERVE_TEST_POISON` set, every process puts it in the place of FastServe's own. A block
whose copy is missing, late or wrong then holds large numbers instead of what it held before, and
no such mistake leaves the tokens as they are. With `FASTSERVE_TEST_FAIL=N`, every Nth copy fails.

The numbers, 3,156 as float32 and 3,152 as bfloat16, are not so large that computing on them
overflows. Where a copy fails, a step has computed on them before that is known; not-a-numbers that
it left in a block would reach the block's next owner, through the masked lanes of vLLM's attention
on a CPU.
"""

import itertools
import os

POISON = 0x45


def register():
    """A `vllm.general_plugins` entry point: vLLM calls it in the engine and in every worker."""
    if every := int(os.environ.get("FASTSERVE_TEST_FAIL", "0")):
        fail_copies(every)
    if not os.environ.get("FASTSERVE_TEST_POISON"):
        return
    from fastserve_vllm.kv_swap import connector
    from fastserve_vllm.kv_swap.transfers import Direction

    class PoisoningWorker(connector.SwapWorker):
        def submit(self):
            for transfer in self._pending:
                if transfer.direction is Direction.IN:
                    self._poison(transfer.device_blocks)
            super().submit()

        def _poison(self, blocks):
            for rows in self._engine._rows.device:
                rows[:, list(blocks)] = POISON

    connector.SwapWorker = PoisoningWorker


def fail_copies(every):
    """Let every so manieth copy raise."""
    from fastserve_vllm.kv_swap.copies import SynchronousCopies

    calls, copy = itertools.count(1), SynchronousCopies._copy_runs

    def fails(self, transfer):
        if next(calls) % every == 0:
            raise OSError("a made-up failure")
        copy(self, transfer)

    if copy.__name__ != "fails":
        SynchronousCopies._copy_runs = fails
