"""Engines without a model, small enough for step tables."""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest

from fastserve_vllm.testing import ModelFreeEngine, vllm_config

# A pinned ladder: a step of 1 ms is one base quantum, a prompt costs 1 ms and 10 us a token.
PROFILE = (
    '{"step_s": 0.001, "prefill_token_s": 1e-5, "decode_s": 0, "context_token_s": 0,'
    ' "base_quantum_s": 0.001}'
)


@pytest.fixture
def make_engine(tiny_model, tmp_path, monkeypatch):
    """Builds an engine: `make_engine(max_num_seqs=2, num_blocks=9, fastserve={...})`.

    With `v2` the scheduler works for vLLM's V2 model runner, which itself needs an accelerator.
    """

    def build(num_blocks=1024, fastserve=None, stock=False, copy_steps=0, v2=False, **args):
        profile = tmp_path / "profile.json"
        profile.write_text(PROFILE)
        # Tables are computed by hand, for quanta that double.
        settings = {"step_time_profile": str(profile), "quantum_ratio": 2.0}
        settings |= {"swap_space_gib": 0.004, **(fastserve or {})}
        args.setdefault("max_num_seqs", 2)
        config = vllm_config(str(tiny_model), None if stock else settings, **args)
        if v2:
            monkeypatch.setattr(type(config), "use_v2_model_runner", True)
        make = config.scheduler_config.get_scheduler_cls() if stock else None
        return ModelFreeEngine(config, num_blocks, make, copy_steps=copy_steps)

    return build
