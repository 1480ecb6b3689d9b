"""KV blocks as a server hands them out that has run for long: in no order.

A fresh engine hands out its blocks one after the other, so the requests of a batch lie close
together until the pool has been through some thousand requests. On a CPU that makes attention
cheaper, the more so the fewer requests hold KV cache: not for as long as a server runs, but for as
long as a benchmark does. So what is measured on the wall's clock begins with blocks in no order.
"""

from __future__ import annotations

import random
from typing import Any

_SEED = 0


def shuffle(pool: Any) -> None:
    """Put the free blocks of vLLM's block pool into an order that is always the same."""
    blocks = pool.get_new_blocks(pool.get_num_free_blocks())
    _random().shuffle(blocks)
    pool.free_blocks(blocks)


def install() -> None:
    """Let every block pool that this process makes from now on begin with blocks in that order."""
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue as Queue

    # Not the pool's: FastServe looks into that one before it relies on it.
    make: Any = Queue.__init__

    def make_used(queue: Any, blocks: list[Any]) -> None:
        # The first one becomes the null block.
        first, *others = blocks
        _random().shuffle(others)
        make(queue, [first, *others])

    setattr(Queue, "__init__", make_used)  # noqa: B010 - a type checker forbids the other way


def _random() -> random.Random:
    return random.Random(_SEED)
