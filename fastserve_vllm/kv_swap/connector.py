"""A KV connector that moves no KV: it carries the configuration in and the statistics out.

vLLM hands `kv_connector_extra_config` to the scheduler process without touching its compile
cache, and collects a connector's statistics for its own `/metrics`. Both need a connector that is
always configured, so `--scheduler fastserve` always configures this one.
"""

from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.kv_swap.statistics import FastServePromMetrics, FastServeStats
from fastserve_vllm.selection import CONFIG_KEY

if TYPE_CHECKING:
    from collections.abc import Callable


class FastServeMetadata(KVConnectorMetadata):
    """What crosses to the workers in a step: nothing."""


class FastServeConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. `statistics` is set by the scheduler once it exists."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        self.config = FastServeConfig.parse(extra.get(CONFIG_KEY))
        self.statistics: Callable[[], dict[str, Any] | None] | None = None

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

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Nothing to tell the workers."""
        return FastServeMetadata()

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """No KV is kept outside the device."""
        return 0, False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Nothing is loaded."""

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed at once."""
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed at once."""
        return False, None

    def reset_cache(self) -> bool:
        """Nothing is cached here."""
        return True

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

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
