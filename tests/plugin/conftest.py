"""vLLM's real command line, as its `main` builds it."""

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser


@pytest.fixture(scope="session")
def parser():
    """The parser of `vllm serve` and `vllm bench ...`."""
    from vllm.entrypoints.cli import serve
    from vllm.entrypoints.cli.benchmark import main as bench

    parser = FlexibleArgumentParser(prog="vllm")
    commands = parser.add_subparsers(dest="subparser")
    with pytest.MonkeyPatch.context() as patch:
        # The benchmarks' parsers are built only for a command line that names them.
        patch.setattr("sys.argv", ["vllm", "bench"])
        for module in (serve, bench):
            for command in module.cmd_init():
                command.subparser_init(commands)
    return parser


@pytest.fixture
def namespace(parser, tiny_model):
    """Parses a command line for the tiny model, as vLLM does before it reads engine arguments."""

    def parse(*flags, command=("serve",)):
        model = [tiny_model] if command == ("serve",) else ["--model", tiny_model]
        args = parser.parse_args([*command, *model, *flags])
        args.model = tiny_model
        return args

    return parse


@pytest.fixture
def engine_args(namespace):
    """Parses a command line and reads the engine's arguments from it."""

    def parse(*flags, command=("serve",)):
        kind = EngineArgs if "latency" in command else AsyncEngineArgs
        return kind.from_cli_args(namespace(*flags, command=command))

    return parse
