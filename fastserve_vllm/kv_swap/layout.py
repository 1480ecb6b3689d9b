"""Which bytes of the KV cache a block id names, which layers allow that, and how many fit a host.

A device block id names one row in each *region* of the KV cache. Regions are read off vLLM's
placement of the layers, so that a copy moves whole blocks whatever lies in them: one layer or
all, keys next to values or apart, quantized or not.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

from fastserve_vllm.config import ConfigError

_ADVICE = "use --fastserve-config.swap_mode recompute"

# Attention whose blocks are only ever appended to, and found by block id alone. Exact types: what
# a subclass adds (sinks shared by all requests, rings that are overwritten) may break that.
_SWAPPABLE = (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SlidingWindowMLASpec,
    ChunkedLocalAttentionSpec,
)


@dataclass(frozen=True, slots=True)
class Stack:
    """Regions that follow each other in an allocation of the KV cache; each a row per block.

    Attributes:
        layer: name of a layer that lives in the allocation.
        start: bytes from the allocation's beginning to the first region.
        row_bytes: size of a row, and the distance to the next block's.
        regions: how many there are.
    """

    layer: str
    start: int
    row_bytes: int
    regions: int = 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all the regions."""
        return self.regions * self.row_bytes

    def rows(self, kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> torch.Tensor:
        """The bytes as [regions, num_blocks, row_bytes], a view of the KV cache.

        Raises:
            RuntimeError: the layer's allocation is smaller than its placement says.
        """
        storage = kv_caches[self.layer].untyped_storage()
        end = self.start + num_blocks * self.block_bytes
        if storage.nbytes() < end:
            raise RuntimeError(
                f"KV cache of {self.layer}: {storage.nbytes()} bytes where {end} were placed"
            )
        raw = torch.empty(0, dtype=torch.int8, device=storage.device).set_(storage)
        return raw[self.start : end].view(self.regions, num_blocks, self.row_bytes)


def stacks(kv_cache_config: KVCacheConfig) -> list[Stack]:
    """Where one rank's blocks lie. Layer groups overlay each other: shared rows come once."""
    found: list[Stack] = []
    follows = None
    for (size, start, row_bytes), layer in sorted(_regions(kv_cache_config).items()):
        if (size, start, row_bytes) == follows:
            found[-1] = replace(found[-1], regions=found[-1].regions + 1)
        else:
            found.append(Stack(layer, start, row_bytes))
        follows = size, start + kv_cache_config.num_blocks * row_bytes, row_bytes
    return found


def _regions(kv_cache_config: KVCacheConfig) -> dict[tuple[int, int, int], str]:
    """A layer's name for each distinct (size of the allocation, first byte, row size)."""
    found: dict[tuple[int, int, int], str] = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        for start in _starts(tensor, kv_cache_config.num_blocks):
            found.setdefault((tensor.size, start, tensor.block_stride), tensor.layers[0])
    return found


def _starts(tensor: KVCacheTensor, num_blocks: int) -> range:
    """First bytes of the regions that hold the tensor's layers."""
    region_bytes = num_blocks * tensor.block_stride
    if tensor.layer_stride < region_bytes:
        return range(1)  # A block holds all layers side by side: the allocation is one region.
    end = tensor.offset + len(tensor.layers) * tensor.layer_stride
    return range(tensor.offset, end, region_bytes)


def block_bytes(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> int:
    """Bytes of one block on a rank; with pipeline parallelism, on the rank that has most layers.

    The scheduler and every rank get the same figure where all layers are of one size.
    """
    own_bytes = sum(stack.block_bytes for stack in stacks(kv_cache_config))
    own, largest = _stage_layers(vllm_config)
    return -(-own_bytes * largest // own)


def _stage_layers(vllm_config: VllmConfig) -> tuple[int, int]:
    """Layers of this rank's pipeline stage, at least 1, and of the largest stage."""
    parallel = vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    if stages == 1:
        return 1, 1
    total = vllm_config.model_config.get_total_num_hidden_layers()
    bounds = [get_pp_indices(total, stage, stages) for stage in range(stages)]
    layers = [end - start for start, end in bounds]
    # vLLM numbers ranks stage by stage; the scheduler has rank 0, whose layers it is given.
    own = layers[parallel.rank // parallel.tensor_parallel_size % stages]
    return max(own, 1), max(layers)


def host_block_count(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, swap_space_bytes: int
) -> int:
    """Blocks that each rank's `swap_space_bytes` hold; 0 for a model without KV cache.

    Raises:
        ConfigError: there is a KV cache, but not even one of its blocks fits.
    """
    size = block_bytes(vllm_config, kv_cache_config)
    if not size:
        return 0
    if swap_space_bytes < size:
        raise ConfigError(
            f"fastserve_config.swap_space_gib: {swap_space_bytes} bytes hold no block of KV "
            f"cache, which takes {size} bytes on each device"
        )
    return swap_space_bytes // size


def refuse_unsupported(kv_cache_config: KVCacheConfig) -> None:
    """Make sure that every layer's KV cache survives a round trip to the host.

    Raises:
        ConfigError: naming the kind of layers whose KV cache does not, and what to do.
    """
    for group in kv_cache_config.kv_cache_groups:
        for kind in _unsupported(group):
            layers = ", ".join([*group.layer_names[:2], "..."][: len(group.layer_names)])
            raise ConfigError(f"KV cache of kind {kind} ({layers}) cannot be swapped; {_ADVICE}")
    if kv_cache_config.needs_kv_cache_zeroing:
        kinds = {type(spec).__name__ for spec in _specs(kv_cache_config.kv_cache_groups)}
        raise ConfigError(
            f"KV cache of mixed precision ({', '.join(sorted(kinds))}), whose blocks vLLM zeroes "
            f"before use, cannot be swapped; {_ADVICE}"
        )


def _unsupported(group: KVCacheGroupSpec) -> Iterator[str]:
    """Kinds of the group's layers that cannot be swapped."""
    elsewhere = group.host_resident or not group.enable_kv_transfer
    for spec in _specs([group]):
        # What vLLM would not restore from a cache is no record of the request's tokens alone.
        if elsewhere or type(spec) not in _SWAPPABLE or not spec.prefix_cacheable:
            yield type(spec).__name__


def _specs(groups: Iterable[KVCacheGroupSpec]) -> Iterator[KVCacheSpec]:
    for group in groups:
        yield from iter_layer_specs(group.kv_cache_spec)
