"""KV blocks in no order, as a server has them that has run for long."""

import itertools
import subprocess
import sys

import pytest
from vllm.v1.core.block_pool import BlockPool

from benchmarks.plugins import plugin_environment
from benchmarks.used_pool import shuffle

BLOCKS = 64
IN_VLLM = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from fastserve_vllm import host
host.check()
from vllm.v1.core.block_pool import BlockPool
pool = BlockPool(64, enable_caching=True, hash_block_size=16)
print("ids", *[block.block_id for block in pool.get_new_blocks(63)])
"""


@pytest.mark.host_versions
def test_free_blocks_are_in_no_order():
    """All are still there, and free."""
    pool = BlockPool(BLOCKS, enable_caching=True, hash_block_size=16)
    shuffle(pool)
    assert pool.get_num_free_blocks() == BLOCKS - 1
    ids = [block.block_id for block in pool.get_new_blocks(BLOCKS - 1)]
    assert sorted(ids) == list(range(1, BLOCKS))
    assert sum(after - before == 1 for before, after in itertools.pairwise(ids)) < 8


def test_vllm_finds_the_plugin(tmp_path, subprocess_env):
    """In whatever process it loads its plugins, the pools are in the order of `shuffle`.

    FastServe starts on such a vLLM: it looks into the block pool first.
    """
    pool = BlockPool(BLOCKS, enable_caching=True, hash_block_size=16)
    shuffle(pool)
    expected = [block.block_id for block in pool.get_new_blocks(BLOCKS - 1)]
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM],
        env=subprocess_env | plugin_environment(tmp_path, None),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1].split() == ["ids", *map(str, expected)]
