"""`--scheduler` and `--fastserve-config` for vLLM's command line."""

import argparse
import json
import sys
from typing import Any

from fastserve_vllm import host
from fastserve_vllm.config import ConfigError, FastServeConfig
from fastserve_vllm.selection import engine_overrides, refuse_conflicts

SCHEDULERS = ("fastserve",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add FastServe's flags to a parser of engine arguments."""
    group = add_config_argument(parser)
    group.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default=None,
        help="Replace vLLM's iteration scheduler.",
    )


def add_config_argument(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flag of FastServe's configuration, in a group of its own; returns the group."""
    group = parser.add_argument_group(
        "FastServe", "Skip-join multi-level feedback queues with preemption at every token."
    )
    group.add_argument(
        "--fastserve-config",
        type=_parse_config,
        default=None,
        help="FastServe's configuration as JSON, or by key: --fastserve-config.num_levels 8.",
    )
    return group


def apply_or_exit(args: argparse.Namespace) -> None:
    """`apply`, ending the program as a parser does: with one line and status 2."""
    try:
        apply(args)
    except (ValueError, host.HostContractError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


def apply(args: argparse.Namespace) -> None:
    """Rewrite parsed arguments so that vLLM's own ones select FastServe; does so once.

    Raises:
        ValueError: flags that exclude each other, or a configuration without the scheduler.
        HostContractError: the installed vLLM does not fit; found before a model is loaded.
    """
    config = getattr(args, "fastserve_config", None)
    if getattr(args, "scheduler", None) not in SCHEDULERS:
        if config is not None:
            raise ValueError("--fastserve-config has no effect without --scheduler fastserve")
        return
    host.check()
    refuse_conflicts(args.scheduler_cls, args.kv_offloading_size)
    overrides = engine_overrides(config, args.kv_transfer_config)
    args.scheduler_cls = overrides["scheduler_cls"]
    args.kv_transfer_config = _transfer_config(overrides["kv_transfer_config"])
    # The namespace travels to other processes, where it is read again.
    args.scheduler = args.fastserve_config = None


def _parse_config(text: str) -> FastServeConfig:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is expected, got {text}")
    try:
        return FastServeConfig.parse(raw)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _transfer_config(mapping: dict[str, Any]) -> Any:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**mapping)
