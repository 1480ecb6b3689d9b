"""Holds a worker in the middle of a KV copy: what happens when it dies or stalls there?

With `FASTSERVE_TEST_HOLD=FOLDER`, a worker of rank R that begins a copy while the file `hold-R` is
in the folder writes its process id to `held-R` and copies nothing until `hold-R` is gone.
"""

import os
import time
from pathlib import Path


def register():
    """A `vllm.general_plugins` entry point: vLLM calls it in the engine and in every worker."""
    if not (folder := os.environ.get("FASTSERVE_TEST_HOLD")):
        return
    from fastserve_vllm.kv_swap.copies import SynchronousCopies

    copy = SynchronousCopies._copy_runs

    def held(self, transfer):
        from vllm.distributed.parallel_state import get_world_group

        rank = get_world_group().rank
        hold = Path(folder) / f"hold-{rank}"
        if hold.exists():
            (Path(folder) / f"held-{rank}").write_text(str(os.getpid()))
            while hold.exists():
                time.sleep(0.01)
        copy(self, transfer)

    if copy.__name__ != "held":
        SynchronousCopies._copy_runs = held
