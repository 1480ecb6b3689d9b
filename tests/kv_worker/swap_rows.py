"""Rows to copy between, transfers to copy them, and a KV cache as vLLM allocates it."""

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    compute_layout_strides,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from fastserve_vllm.kv_swap.copies import BlockRows
from fastserve_vllm.kv_swap.transfers import Direction, Transfer


def random_rows(device, shapes=((3, 256), (1, 96)), device_blocks=20, host_blocks=16):
    """Random bytes on the device and zeros on the host, for stacks of (regions, row bytes)."""
    pinned = device.type != "cpu"
    made = [
        torch.randint(-128, 128, (regions, device_blocks, size), dtype=torch.int8, device=device)
        for regions, size in shapes
    ]
    host = [
        torch.zeros(regions, host_blocks, size, dtype=torch.int8, pin_memory=pinned)
        for regions, size in shapes
    ]
    return BlockRows(made, host)


def out(transfer_id, device_blocks, host_blocks, *, urgent=False):
    """A transfer from device to host."""
    return Transfer(
        transfer_id, Direction.OUT, tuple(device_blocks), tuple(host_blocks), urgent=urgent
    )


def back(transfer_id, device_blocks, host_blocks, *, urgent=False):
    """A transfer from host to device."""
    return Transfer(
        transfer_id, Direction.IN, tuple(device_blocks), tuple(host_blocks), urgent=urgent
    )


def attention(block_size=4, num_kv_heads=2, head_size=8, dtype=torch.float32, **fields):
    """A spec of full attention layers."""
    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        **fields,
    )


THREE_LAYERS = ((attention(), 3),)


def kv_cache_config(layout="LBHNC", groups=THREE_LAYERS, num_blocks=10):
    """Layer groups over one allocation, placed as vLLM places them.

    Args:
        layout: name of a `KVCacheLayout`.
        groups: (spec, number of layers) of each group.
        num_blocks: device blocks.
    """
    layout = KVCacheLayout[layout]
    page = max(spec.page_size_bytes * layers for spec, layers in groups)
    tensors, group_specs = [], []
    for spec, layers in groups:
        names = [f"layers.{len(group_specs)}.{i}" for i in range(layers)]
        fixed = (None, page if layout.is_block_outermost else None, None, None, None)
        strides = compute_layout_strides(spec, num_blocks, layers, layout, fixed_strides=fixed)
        tensors.append(KVCacheTensor(page * num_blocks, names, strides[0], strides[1]))
        group_specs.append(KVCacheGroupSpec(names, spec))
    return KVCacheConfig(num_blocks, tensors, group_specs)


def allocate(config, layout="LBHNC", device="cpu"):
    """The KV cache as vLLM's workers allocate it: tensors by layer, filled with random bytes."""
    kv_caches = allocate_kv_cache(config, torch.device(device), KVCacheLayout[layout])
    for cache in kv_caches.values():
        raw = torch.empty(0, dtype=torch.int8, device=device).set_(cache.untyped_storage())
        raw.copy_(torch.randint(-128, 128, raw.shape, dtype=torch.int8))
    return kv_caches
