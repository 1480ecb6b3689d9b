"""The line that the engine logs when it starts."""

import re

from fastserve_vllm.start_line import describe
from fastserve_vllm.testing import ModelFreeEngine, vllm_config


def test_start_line(tiny_model):
    """Policy, ladder, batch limit, device and host blocks, swap mode."""
    config = vllm_config(tiny_model, {"swap_mode": "reactive", "num_levels": 6}, max_num_seqs=7)
    line = describe(ModelFreeEngine(config, num_blocks=99).scheduler)
    assert "\n" not in line
    for words in (
        "policy fastserve",
        "6 levels",
        "to 6 s",
        "quantum ratio 2",
        "batch limit 7",
    ):
        assert words in line
    assert "99 device blocks" in line
    assert re.search(r"reactive KV swap to \d+ host blocks", line)
