"""The `vllm.general_plugins` entry point: adds two flags, changes nothing until they are used."""

import argparse
from typing import Any

_MARK = "_fastserve_registered"


def register() -> None:
    """Teach vLLM's engine arguments the flags of `fastserve_vllm.cli`. Idempotent.

    vLLM calls this in every process, before it parses a command line. Two static members of
    `EngineArgs` are wrapped: the one that declares the flags and the one that reads them. The
    connector's name is registered, for nothing loads it until it is configured.
    """
    from vllm.engine.arg_utils import EngineArgs

    from fastserve_vllm.selection import register_connector

    if getattr(EngineArgs, _MARK, False):
        return
    register_connector()
    declare, read = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__

    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        from fastserve_vllm import cli

        parser = declare(parser)
        cli.add_arguments(parser)
        return parser

    def from_cli_args(cls: type[Any], args: argparse.Namespace) -> Any:
        from fastserve_vllm import cli

        cli.apply_or_exit(args)
        return read(cls, args)

    EngineArgs.add_cli_args = staticmethod(add_cli_args)
    EngineArgs.from_cli_args = classmethod(from_cli_args)
    setattr(EngineArgs, _MARK, True)
