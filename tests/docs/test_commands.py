"""Every command in the documents is run by a test, or the text says which hardware it needs."""

import ast
import re
import subprocess
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from documented import Command, UnlabelledBlockError, commands
from vllm.utils.argparse_utils import FlexibleArgumentParser

from fastserve_vllm.commands import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "examples" / "README.md",
]
COMMANDS = [command for path in DOCUMENTS for command in commands(path)]

# Who runs it: a test, named by its file and function, runs the same program with the same kind of
# arguments. What the documented arguments are is checked below.
RUN_BY = {
    "make serve": "tests/e2e/test_http.py",
    "make test": "tests/docs/test_commands.py",  # you are looking at it
    "make demo": "tests/benchmarks/test_benchmark_demo.py",
    "make bench": "tests/benchmarks/test_benchmark_run.py",
    "make lint": ".ci/run",
    "make format": ".ci/run",
    "make dev-env": ".ci/run",
    "make env": ".ci/run",
    "make exact": "tests/e2e/test_exactness.py",
    "make host-tests": "tests/host/vllm_suite/run.py",
    "make fuzz": "tests/fuzz/test_scheduler_fuzz.py",
    "make soak": "tests/soak/test_soak.py",
    "make dashboards": "tests/observability/test_catalogue.py",
    "make dashboards-demo": "tests/e2e/test_prometheus.py",
    "vllm serve": "tests/e2e/test_http.py",
    "curl": "tests/e2e/test_http.py",
    "fastserve explain": "tests/observability/test_trace.py::test_explain",
    "fastserve timeline": "tests/observability/test_trace.py::test_timeline",
    "fastserve top": "tests/observability/test_top.py::test_view",
    "fastserve simulate": "tests/docs/test_commands.py::test_simulations_run",
    "fastserve plan": "tests/docs/test_commands.py::test_simulations_run",
    "python -m pytest": "tests/docs/test_commands.py",
    "python -m benchmarks.run": "tests/benchmarks/test_benchmark_run.py",
    "python -m benchmarks.report": "tests/benchmarks/test_benchmark_report.py",
    "python -m benchmarks.figures": "tests/benchmarks/test_benchmark_figures.py",
    "python -m benchmarks.fit_workload": "tests/benchmarks/test_benchmark_fit.py",
    "python -m benchmarks.gpu": "tests/benchmarks/test_benchmark_gpu.py",
    "python -m benchmarks.frontier": "tests/benchmarks/test_benchmark_small.py::test_frontier",
    "python -m benchmarks.slower_steps": "tests/benchmarks/test_benchmark_slower_steps.py",
    "python -m benchmarks.sustained": "tests/benchmarks/test_benchmark_sustained.py",
    "python -m benchmarks.validate": "tests/benchmarks/test_benchmark_validate.py",
    "python -m benchmarks.scheduler_overhead": (
        "tests/benchmarks/test_benchmark_small.py::test_scheduler_overhead"
    ),
    "python -m benchmarks.observability_overhead": (
        "tests/benchmarks/test_benchmark_small.py::test_observability_overhead"
    ),
    "python -m benchmarks.chat_identity": (
        "tests/benchmarks/test_benchmark_small.py::test_chat_identity"
    ),
    "python scripts/tiny_model.py": "tests/benchmarks/test_benchmark_small.py::test_deeper_model",
    "python examples/offline_batch.py": "tests/e2e/test_examples.py::test_offline_batch",
    "python examples/online_client.py": "tests/e2e/test_examples.py::test_online_client",
    "python examples/async_engine.py": "tests/e2e/test_examples.py::test_async_engine",
    "python examples/priorities.py": "tests/e2e/test_examples.py::test_priorities",
    "python examples/custom_policy.py": "tests/e2e/test_examples.py::test_custom_policy",
    "python examples/quantum_sweep.py": "tests/e2e/test_examples.py::test_quantum_sweep",
    "python examples/ray_serve/app.py": "tests/deploy/test_ray_serve.py",
}
SIMULATIONS = ("fastserve simulate", "fastserve plan")


def kind(command: Command) -> str:
    """What a command is looked up by: the program and what it is told to run."""
    words = command.words
    if command.program == "python":
        return " ".join(("python", *words[1 : 3 if words[1] == "-m" else 2]))
    if command.program == "curl":
        return "curl"
    return " ".join((command.program, *words[1:2]))


def of_kind(*kinds: str) -> list[Command]:
    """The commands of these kinds, each once."""
    return list({c.words: c for c in COMMANDS if kind(c) in kinds}.values())


def test_there_are_some():
    """The search finds what the README says first."""
    assert ("vllm", "serve", "MODEL", "--scheduler", "fastserve") in [c.words for c in COMMANDS]
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_run_or_needs_hardware(command):
    """One that is not in the table is new: add the test that runs it, or say what it needs."""
    known = RUN_BY.get(kind(command))
    assert known or command.needs, (
        f"{command}: no test runs it (RUN_BY), and neither the heading nor the paragraph before it "
        "says which hardware it needs"
    )


@pytest.mark.parametrize("test", sorted(set(RUN_BY.values())))
def test_the_table_is_true(test):
    """Each test that it names exists."""
    name, _, function = test.partition("::")
    assert (ROOT / name).is_file()
    if function:
        tree = ast.parse((ROOT / name).read_text())
        functions = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        assert function in functions


@pytest.mark.parametrize("text", ["frobnicate --now", "make serve\n  and so on"])
def test_unknown_programs_are_refused(tmp_path, text):
    """A block that is neither commands nor labelled as text."""
    path = tmp_path / "some.md"
    path.write_text(f"words\n\n```\n{text}\n```\n")
    with pytest.raises(UnlabelledBlockError, match="begins with ```text"):
        list(commands(path))


@pytest.mark.parametrize(
    ("before", "needs"),
    [("## On a GPU\n", "GPU"), ("Needs two GPUs:\n\n", "GPUs"), ("On a GPU.\n\nNow:\n\n", "")],
)
def test_hardware_is_read_from_the_text(tmp_path, before, needs):
    """From the heading, or from the paragraph before the block, not from further up."""
    path = tmp_path / "some.md"
    path.write_text(f"{before}```\nmake x  # words\n```\n")
    (command,) = commands(path)
    assert command.words == ("make", "x")
    assert command.needs == needs


@pytest.mark.parametrize("command", of_kind(*(k for k in RUN_BY if k.startswith("make"))), ids=str)
def test_make_knows_the_target(command):
    """And its variables can be expanded."""
    done = subprocess.run(
        ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def parser():
    """Of `vllm serve`, the plugin loaded."""
    # Elsewhere in vLLM 0.33, where these tests are not run.
    from vllm.entrypoints.launchers.cli_args import make_arg_parser

    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize("command", of_kind("vllm serve"), ids=str)
def test_vllm_takes_the_flags(command, parser):
    """Parsed by vLLM's own parser."""
    args = parser.parse_args(list(command.words[2:]))
    if "fastserve" in command.words:
        assert args.scheduler == "fastserve"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.program == "fastserve"], ids=str)
def test_fastserve_takes_the_options(command):
    """Every option of the command exists."""
    context = click.Context(main)
    subcommand = main.get_command(context, command.words[1])
    options = {text for param in subcommand.params for text in param.opts}
    assert {word for word in command.words if word.startswith("-")} <= options


@pytest.mark.parametrize("command", of_kind(*SIMULATIONS), ids=str)
def test_simulations_run(command):
    """On built-in lengths, as written but for the number of requests."""
    words = list(command.words[1:])
    if "--workload" not in words:
        pytest.skip("needs the reader's own trace")
    if "--requests" in words:
        at = words.index("--requests")
        del words[at : at + 2]
    done = CliRunner().invoke(main, [*words, "--requests", "50"], catch_exceptions=False)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if kind(c).startswith("python -m benchmarks.")], ids=str
)
def test_benchmarks_have_the_options(command):
    """Every option is one that the benchmarks declare."""
    declared = set()
    for path in (ROOT / "benchmarks").rglob("*.py"):
        declared |= set(re.findall(r'"(--[a-z][a-z-]*)"', path.read_text()))
    assert {word for word in command.words if word.startswith("--")} <= declared
    module = command.words[2].replace(".", "/")
    assert (ROOT / f"{module}.py").is_file() or (ROOT / module / "__main__.py").is_file()
