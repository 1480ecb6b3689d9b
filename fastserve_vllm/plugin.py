"""The `vllm.general_plugins` entry point: adds two flags, changes nothing until they are used."""

import argparse
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_MARK = "_fastserve_registered"
_REGISTRY = "vllm.v1.core.sched.registry"
NAME = "fastserve"


def register() -> None:
    """Teach vLLM's engine arguments the flags of `fastserve_vllm.cli`. Idempotent.

    vLLM calls this in every process, before it parses a command line. A vLLM with a registry of
    schedulers (`patches/`) is told of ours; elsewhere two static members of `EngineArgs` are
    wrapped: the one that declares the flags and the one that reads them. The connector's name is
    registered, for nothing loads it until it is configured.
    """
    from vllm.engine.arg_utils import EngineArgs

    from fastserve_vllm.selection import register_connector

    if getattr(EngineArgs, _MARK, False):
        return
    register_connector()
    if find_spec(_REGISTRY) is not None:
        _enter(import_module(_REGISTRY))
    else:
        _wrap(EngineArgs)
    setattr(EngineArgs, _MARK, True)


def _enter(registry: Any) -> None:
    """Register the scheduler by its name; what it needs is imported when it is used."""

    def select(engine_args: Any) -> None:
        from fastserve_vllm import host, selection

        host.check()
        selection.select(engine_args)

    def add_flags(parser: argparse.ArgumentParser) -> None:
        from fastserve_vllm import cli

        cli.add_config_argument(parser)

    def apply_flags(args: argparse.Namespace) -> None:
        from fastserve_vllm import cli

        cli.apply_or_exit(args)

    registry.register_scheduler(NAME, registry.SchedulerEntry(select, add_flags, apply_flags))


def _wrap(engine_args: Any) -> None:
    """Declare and read the flags around vLLM's own."""
    declare, read = engine_args.add_cli_args, engine_args.from_cli_args.__func__

    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        from fastserve_vllm import cli

        parser = declare(parser)
        cli.add_arguments(parser)
        return parser

    def from_cli_args(cls: type[Any], args: argparse.Namespace) -> Any:
        from fastserve_vllm import cli

        cli.apply_or_exit(args)
        return read(cls, args)

    engine_args.add_cli_args = staticmethod(add_cli_args)
    engine_args.from_cli_args = classmethod(from_cli_args)
