"""Turns "schedule with FastServe" into engine arguments that vLLM already has."""

import contextlib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from fastserve_vllm.config import POLICY_NAMES, FastServeConfig
from fastserve_vllm.policy.make import own_policy

if TYPE_CHECKING:
    from vllm import EngineArgs

SCHEDULER_CLASS = "fastserve_vllm.scheduler.FastServeScheduler"
CONFIG_KEY = "fastserve"
_CONNECTOR_NAME = "FastServeConnector"
_CONNECTOR_MODULE = "fastserve_vllm.kv_swap.connector"
_CONNECTOR: dict[str, Any] = {
    "kv_connector": _CONNECTOR_NAME,
    "kv_connector_module_path": _CONNECTOR_MODULE,
    # Not "kv_both": a consumer makes vLLM keep freed blocks back for a step, and accept embeddings
    # from clients of multimodal models. FastServe's copies are ordered after the steps in flight by
    # the workers, and its KV comes from nobody else, so it needs neither.
    "kv_role": "kv_producer",
    "kv_load_failure_policy": "recompute",
}


def engine_overrides(
    config: FastServeConfig | Mapping[str, Any] | None = None, kv_transfer_config: Any = None
) -> dict[str, Any]:
    """Engine arguments that select the scheduler and configure its connector.

    Args:
        config: the FastServe configuration; None: the defaults.
        kv_transfer_config: the user's own `KVTransferConfig` (or its mapping), which is composed
            with FastServe's connector through vLLM's MultiConnector.

    Raises:
        ConfigError: the configuration is not valid.
    """
    if not isinstance(config, FastServeConfig):
        config = FastServeConfig.parse(config)
    if config.policy not in POLICY_NAMES:
        # Tried here, so that a mistake is told before an engine starts.
        own_policy(config.policy)
    ours = {**_CONNECTOR, "kv_connector_extra_config": {CONFIG_KEY: config.to_dict()}}
    return {
        "scheduler_cls": SCHEDULER_CLASS,
        "kv_transfer_config": _compose(ours, _as_mapping(kv_transfer_config)),
    }


def select(
    engine_args: "EngineArgs", config: FastServeConfig | Mapping[str, Any] | None = None
) -> "EngineArgs":
    """Make `engine_args` use FastServe; changes and returns it.

    Raises:
        ConfigError: the configuration is not valid.
        ValueError: `engine_args` names another scheduler class, or sets `kv_offloading_size`.
    """
    from vllm.config import KVTransferConfig

    refuse_conflicts(engine_args.scheduler_cls, engine_args.kv_offloading_size)
    overrides = engine_overrides(config, engine_args.kv_transfer_config)
    engine_args.scheduler_cls = overrides["scheduler_cls"]
    engine_args.kv_transfer_config = KVTransferConfig(**overrides["kv_transfer_config"])
    return engine_args


def refuse_conflicts(scheduler_cls: Any, kv_offloading_size: float | None) -> None:
    """Refuse engine arguments that take the places which FastServe takes.

    Raises:
        ValueError: a scheduler class is named, or vLLM's own KV offloading is asked for in the
            way that overwrites the configured KV connector.
    """
    if scheduler_cls == SCHEDULER_CLASS:
        raise ValueError("FastServe is selected already: select it once, with one configuration")
    if scheduler_cls is not None:
        raise ValueError(
            f"--scheduler fastserve and --scheduler-cls {scheduler_cls} exclude each other: "
            "each names the scheduler. Remove one of them."
        )
    if kv_offloading_size is not None:
        raise ValueError(
            f"--scheduler fastserve and --kv-offloading-size {kv_offloading_size} exclude each "
            "other: the latter replaces FastServe's KV connector. Name the offloading connector "
            "with --kv-transfer-config instead, which is composed with FastServe's."
        )


def register_connector() -> None:
    """Make FastServe's connector known to vLLM by name; does nothing the second time.

    The module path in its configuration is enough for vLLM itself, but MultiConnector looks the
    statistics of its children up by name alone.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    with contextlib.suppress(ValueError):  # known already
        KVConnectorFactory.register_connector(_CONNECTOR_NAME, _CONNECTOR_MODULE, _CONNECTOR_NAME)


def _as_mapping(kv_transfer_config: Any) -> dict[str, Any]:
    """The fields of a `KVTransferConfig` that differ from their defaults."""
    if kv_transfer_config is None or isinstance(kv_transfer_config, Mapping):
        return dict(kv_transfer_config or {})
    return {
        f.name: value
        for f in fields(kv_transfer_config)
        if (value := getattr(kv_transfer_config, f.name)) != _default(f)
    }


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _compose(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """One transfer configuration that holds both connectors; ours alone where there is no other."""
    if not theirs.get("kv_connector"):
        return {**theirs, **ours}
    register_connector()
    if theirs["kv_connector"] == "MultiConnector":
        extra = theirs.get("kv_connector_extra_config", {})
        children = list(extra.get("connectors", []))
    else:
        # The parent passes its engine id to its children; a second one is a duplicate argument.
        extra, children = {}, [{k: v for k, v in theirs.items() if k != "engine_id"}]
    parent = {k: v for k, v in theirs.items() if k != "kv_connector_module_path"}
    return {
        **parent,
        "kv_connector": "MultiConnector",
        "kv_connector_extra_config": {**extra, "connectors": [ours, *children]},
    }
