"""The KV connector: routes configuration in, statistics out, and KV swap between both sides.

vLLM hands `kv_connector_extra_config` to the scheduler process without touching its compile
cache, and collects a connector's statistics for its own `/metrics`. Both need a connector that is
always configured, so `--scheduler fastserve` always configures this one. On the scheduler's side
it forwards to a `KvExchange`, in a worker to a `SwapWorker`; without KV swap there is neither.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.kv_swap.metadata import SwapMetadata, SwapWorkerMetadata
from fastserve_vllm.kv_swap.statistics import FastServePromMetrics, FastServeStats
from fastserve_vllm.kv_swap.worker import SwapWorker
from fastserve_vllm.selection import CONFIG_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastserve_vllm.kv_swap.exchange import KvExchange

_GIB = 1 << 30


class FastServeConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. The scheduler sets `statistics`, and `exchange` where KV is swapped."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self.config = FastServeConfig.parse(extra.get(CONFIG_KEY))
        self.statistics: Callable[[], dict[str, Any] | None] | None = None
        self.exchange: KvExchange | None = None
        self._worker: SwapWorker | None = None
        if role is KVConnectorRole.WORKER and self.config.swap_mode != "recompute":
            swap_space = int(self.config.swap_space_gib * _GIB)
            self._worker = SwapWorker(vllm_config, kv_cache_config, swap_space)

    @property
    def requires_kv_delivery(self) -> bool:
        """False: no KV is handed off, so a preempted request's output stays deliverable."""
        return False

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The scheduler's figures since the last call; None where there is nothing new."""
        figures = self.statistics() if self.statistics is not None else None
        return FastServeStats(data=figures) if figures else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        """Statistics rebuilt from what crossed to the front end."""
        return FastServeStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        """The Prometheus side of the catalogue in `fastserve_vllm.metrics`."""
        return FastServePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # ---- the scheduler's side ---------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers copy in this step."""
        if self.exchange is None:
            return SwapMetadata()
        return SwapMetadata(self.exchange.manager.take_transfers(), self.exchange.take_flush())

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have copied."""
        metadata = connector_output.kv_connector_worker_meta
        if self.exchange is not None and isinstance(metadata, SwapWorkerMetadata):
            self.exchange.take_in(metadata.report, connector_output)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens that come back from the host in the step that vLLM is scheduling."""
        if self.exchange is None:
            return 0, False
        return self.exchange.matched_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """The request's blocks are allocated: those tokens can be copied."""
        if self.exchange is not None:
            self.exchange.allocated(request, num_external_tokens)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether a copy in flight keeps the request's blocks."""
        return self.exchange is not None and self.exchange.finished(request), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        return self.request_finished(request, [])

    def reset_cache(self) -> bool:
        """Host copies go with the prefix cache; the scheduler sees to it."""
        return True

    # ---- a worker's side --------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Prepare host memory for the device's KV cache."""
        if self._worker is not None:
            self._worker.register_kv_caches(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before the step touches a block: save what has been taken from its owner already."""
        if self._worker is not None and isinstance(kv_connector_metadata, SwapMetadata):
            self._worker.begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Submit the step's other copies."""
        if self._worker is not None:
            self._worker.submit()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What was copied since the last step; None: nothing."""
        report = self._worker.take_report() if self._worker is not None else None
        return None if report is None else SwapWorkerMetadata(report)

    def shutdown(self) -> None:
        """Finish what is in flight and give the host memory back."""
        if self._worker is not None:
            self._worker.shutdown()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def find_connector(connector: KVConnectorBase_V1 | None) -> FastServeConnector | None:
    """FastServe's connector in what vLLM built: itself, or one child of a MultiConnector."""
    if isinstance(connector, FastServeConnector):
        return connector
    children = getattr(connector, "sub_connectors", ())
    return next((c for c in children if isinstance(c, FastServeConnector)), None)
