"""A swap worker for tests that ruins device blocks before they are filled from the host.

With `FASTSERVE_TEST_POISON` set, every process puts it in the place of FastServe's own. A block
whose copy is missing, late or wrong then holds huge numbers instead of what it held before, and no
such mistake leaves the tokens as they are.
"""

import os

POISON = 0x7F


def register():
    """A `vllm.general_plugins` entry point: vLLM calls it in the engine and in every worker."""
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
