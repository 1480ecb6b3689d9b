"""The plugin opens no port, unpickles nothing, evaluates nothing, writes only where told to."""

import ast
import logging
from pathlib import Path

import pytest

import fastserve_vllm
from fastserve_vllm.metrics import CATALOGUE
from fastserve_vllm.testing import ModelFreeEngine, vllm_config

PACKAGE = Path(fastserve_vllm.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
# `fastserve top` reads the metrics of the server that it is pointed at; no engine imports it.
CLIENT = {"commands/scrape.py": {"urllib"}}
# Modules that reach a network, run programs, or turn bytes into objects.
DANGEROUS = {
    *("socket", "socketserver", "http", "urllib", "requests", "httpx", "aiohttp", "zmq", "ssl"),
    *("subprocess", "multiprocessing", "ctypes", "pty", "tempfile", "shutil"),
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "yaml"),
}
EVALUATES = {"eval", "exec", "compile", "__import__", "system", "popen", "load_state_dict"}
WRITES = {"write_text", "write_bytes", "mkdir", "unlink", "rename", "touch", "makedirs"}


def nodes(path, kind):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, kind)]


def called(node):
    """Name of what a call calls."""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_dangerous_is_imported_or_called(path):
    """No module that opens ports, runs programs or unpickles; no evaluation of text."""
    imported = {a.name for node in nodes(path, ast.Import) for a in node.names}
    imported |= {node.module or "" for node in nodes(path, ast.ImportFrom)}
    needed = CLIENT.get(str(path.relative_to(PACKAGE)), set())
    assert {name.partition(".")[0] for name in imported} & DANGEROUS == needed
    assert not {called(node) for node in nodes(path, ast.Call)} & EVALUATES


def test_only_configured_files_are_written():
    """Files are written where the user said: a profile, a trace, and what a command is told to."""
    writers = []
    for path in SOURCES:
        for function in nodes(path, ast.FunctionDef):
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                mode = [a.value for a in call.args[1:2] if isinstance(a, ast.Constant)]
                opens = called(call) == "open" and any(set("wax+") & set(m) for m in mode)
                if opens or called(call) in WRITES:
                    writers.append(str(path.relative_to(PACKAGE)))
    assert set(writers) == {
        "commands/plan.py",
        "commands/simulate.py",
        "commands/timeline.py",
        "policy/step_time.py",
        "trace/trace_file.py",
    }


SECRET = 31337  # a token id that stands for what somebody wrote


@pytest.fixture
def busy_engine(tiny_model):
    """An engine that has preempted, swapped, and been asked for its figures on the way."""
    config = vllm_config(tiny_model, {"swap_space_gib": 0.004}, max_num_seqs=3)
    engine = ModelFreeEngine(config, num_blocks=12)
    for i in range(8):
        engine.add(f"secret-{SECRET}-{i}", [SECRET] * 50 + [i], 120)
    return engine


def test_requests_are_in_neither_logs_nor_labels(busy_engine, caplog):
    """Neither what was asked nor a request's name is logged or becomes a label's value."""
    caplog.set_level(logging.DEBUG)
    labels = {}
    while busy_engine.busy:
        busy_engine.step()
        for name, value in (busy_engine.scheduler.connector.statistics() or {}).items():
            if isinstance(value, dict):
                labels.setdefault(name, set()).update(value)
    assert str(SECRET) not in caplog.text
    assert str(SECRET) not in str(labels)
    assert busy_engine.scheduler.planner.counters.paused > 0


def test_labels_have_few_values():
    """Every label's values come from a list that no user can extend, or are
    numbers of levels or of workers."""
    labels = {label for metric in CATALOGUE for label in metric.labels}
    assert labels
    assert {label.name for label in labels if not label.values} <= {"level", "rank"}
    assert all(len(label.values) < 20 for label in labels)
