"""A block id names the same bytes here and in vLLM, and every rank counts host blocks alike."""

import pytest
import torch
from swap_rows import allocate, attention, kv_cache_config
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    MLAAttentionSpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from fastserve_vllm.config import ConfigError
from fastserve_vllm.kv_swap.layout import (
    Stack,
    block_bytes,
    host_block_count,
    refuse_unsupported,
    stacks,
)
from fastserve_vllm.testing import vllm_config

pytestmark = pytest.mark.host_versions

FIELDS = {"block_size": 4, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
LAYOUTS = [layout.name for layout in KVCacheLayout]
WINDOW = SlidingWindowSpec(**FIELDS, sliding_window=8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "groups", [((attention(), 3),), ((attention(), 2), (WINDOW, 3))], ids=["one", "two"]
)
def test_a_block_is_its_rows_and_nothing_else(layout, groups):
    """Clearing a block's rows clears that block in every layer, and no other block."""
    config = kv_cache_config(layout, groups)
    kv_caches = allocate(config, layout)
    before = {name: cache.clone() for name, cache in kv_caches.items()}
    for stack in stacks(config):
        stack.rows(kv_caches, config.num_blocks)[:, 7] = 0
    others = [b for b in range(config.num_blocks) if b != 7]
    for name, cache in kv_caches.items():
        assert not cache[7].view(torch.int8).any()
        assert torch.equal(cache[others].view(torch.int8), before[name][others].view(torch.int8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_bytes_are_copied_once(layout):
    """The rows of all blocks are the whole allocation."""
    config = kv_cache_config(layout, ((attention(), 2), (WINDOW, 3)))
    covered = sum(stack.block_bytes for stack in stacks(config)) * config.num_blocks
    assert covered == config.kv_cache_tensors[0].size


def test_layers_in_a_row_are_one_stack():
    """So that one call copies a run of blocks in all of them."""
    page = attention().page_size_bytes
    assert stacks(kv_cache_config("LBHNC")) == [Stack("layers.0.0", 0, page, 3)]


def test_kernel_blocks_are_no_blocks():
    """A cache seen in smaller kernel blocks is copied in whole blocks of the scheduler's."""
    config = kv_cache_config()
    kv_caches = {
        name: cache.view(2 * config.num_blocks, 2, 2, 16)
        for name, cache in allocate(config).items()
    }
    (stack,) = stacks(config)
    assert stack.rows(kv_caches, config.num_blocks).shape == (3, config.num_blocks, 512)


def test_an_allocation_that_is_too_small_is_named():
    """With what it has and what was placed in it."""
    config = kv_cache_config()
    kv_caches = {name: torch.zeros(16) for name in config.kv_cache_groups[0].layer_names}
    with pytest.raises(RuntimeError, match=r"layers\.0\.0: 64 bytes where 15360 were placed"):
        stacks(config)[0].rows(kv_caches, config.num_blocks)


@pytest.fixture
def config(tiny_model):
    """vLLM's configuration of a model with two layers."""
    return vllm_config(tiny_model)


def staged(config, layers, rank=0, tensor_parallel=1, stages=3):
    """The same, for one rank of a pipeline."""
    config.parallel_config.pipeline_parallel_size = stages
    config.parallel_config.tensor_parallel_size = tensor_parallel
    config.parallel_config.rank = rank
    config.model_config.model_arch_config.total_num_hidden_layers = layers
    return config


def test_host_blocks_fill_the_swap_space(config):
    """Whole blocks only."""
    size = 3 * attention().page_size_bytes
    assert block_bytes(config, kv_cache_config()) == size
    assert host_block_count(config, kv_cache_config(), 5 * size) == 5
    assert host_block_count(config, kv_cache_config(), 6 * size - 1) == 5


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_all_pipeline_stages_count_alike(config, tensor_parallel):
    """Of ten layers, stages have three, four and three; the largest sets the number."""
    counts = {
        host_block_count(
            staged(config, 10, rank=stage * tensor_parallel, tensor_parallel=tensor_parallel),
            kv_cache_config(groups=((attention(), layers),)),
            100_000,
        )
        for stage, layers in enumerate((3, 4, 3))
    }
    assert counts == {100_000 // (4 * attention().page_size_bytes)}


def test_swap_space_below_a_block_is_refused(config):
    """The message names the field and both sizes."""
    with pytest.raises(ConfigError, match=r"swap_space_gib: 1000 bytes .* takes 1536 bytes"):
        host_block_count(config, kv_cache_config(), 1000)


def test_a_model_without_kv_cache_has_no_host_blocks(config):
    """As pooling models have none."""
    assert host_block_count(config, KVCacheConfig(1, [], []), 1000) == 0


def grouped(*specs, **fields):
    """One group for each spec."""
    return KVCacheConfig(4, [], [KVCacheGroupSpec(["layers.0"], s, **fields) for s in specs])


@pytest.mark.parametrize(
    "spec",
    [
        attention(),
        attention(dtype=torch.bfloat16),
        WINDOW,
        ChunkedLocalAttentionSpec(**FIELDS, attention_chunk_size=8),
        MLAAttentionSpec(**{**FIELDS, "num_kv_heads": 1}),
        SlidingWindowMLASpec(**{**FIELDS, "num_kv_heads": 1}, sliding_window=8),
        UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs={"layers.0": attention()}),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_append_only_attention_is_accepted(spec):
    """Alone and next to full attention."""
    refuse_unsupported(grouped(spec))


MAMBA = MambaSpec(block_size=4, shapes=((2, 3),), dtypes=(torch.float32,))


@pytest.mark.parametrize(
    "spec",
    [
        MAMBA,
        CrossAttentionSpec(**FIELDS),
        SinkFullAttentionSpec(**FIELDS, sink_len=4),
        SlidingWindowMLASpec(
            **{**FIELDS, "num_kv_heads": 1}, sliding_window=8, bounded_replay=True
        ),
        UniformTypeKVCacheSpecs(block_size=4, kv_cache_specs={"layers.0": MAMBA}),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_other_kinds_are_refused_by_name(spec):
    """With the kind, a layer, and what to do instead."""
    kind = "MambaSpec" if isinstance(spec, UniformTypeKVCacheSpecs) else type(spec).__name__
    with pytest.raises(ConfigError, match=rf"{kind} \(layers\.0\).*swap_mode recompute"):
        refuse_unsupported(grouped(attention(), spec))


@pytest.mark.parametrize("where", [{"host_resident": True}, {"enable_kv_transfer": False}])
def test_layers_that_live_elsewhere_are_refused(where):
    """Their block ids are not the pool's."""
    with pytest.raises(ConfigError, match="FullAttentionSpec"):
        refuse_unsupported(grouped(attention(), **where))


def test_mixed_precision_is_refused():
    """vLLM zeroes such blocks before use, which a copy would come too late or too early for."""
    quantized = attention(dtype=torch.int8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
    with pytest.raises(ConfigError, match=r"mixed precision \(FullAttentionSpec\).*recompute"):
        refuse_unsupported(grouped(attention(), quantized))
