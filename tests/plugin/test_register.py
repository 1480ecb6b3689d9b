"""Installed but not selected, the plugin changes nothing."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins

from fastserve_vllm.plugin import register

# Run without plugins: compares engine arguments from before registration with those from after it.
BEFORE_AND_AFTER = """
import dataclasses, json, sys
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from fastserve_vllm.plugin import register

FLAGS = ["--model", sys.argv[1], "--max-num-seqs", "3", "--seed", "7"]

def state():
    found = {}
    for kind in (EngineArgs, AsyncEngineArgs):
        parser = kind.add_cli_args(FlexibleArgumentParser())
        args = vars(parser.parse_args(FLAGS))
        found[kind.__name__] = {
            "fields": repr(dataclasses.fields(kind)),
            "defaults": repr(kind(model=sys.argv[1])),
            "parsed": repr(kind.from_cli_args(parser.parse_args(FLAGS))),
            "flags": sorted(args),
        }
    return found

before = state()
register()
print(json.dumps([before, state()]))
"""


def test_registration_changes_no_engine_argument(subprocess_env, tiny_model):
    """Fields, defaults and what is read from a command line stay; two flags are added."""
    command = [sys.executable, "-c", BEFORE_AND_AFTER, tiny_model]
    env = subprocess_env | {"VLLM_PLUGINS": ""}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    for kind in ("EngineArgs", "AsyncEngineArgs"):
        added = set(after[kind].pop("flags")) - set(before[kind].pop("flags"))
        assert added == {"scheduler", "fastserve_config"}
        assert after[kind] == before[kind]


def test_register_is_idempotent():
    """vLLM loads plugins many times in many processes; the second time nothing happens."""
    load_general_plugins()
    register()
    members = vars(EngineArgs).copy()
    register()
    assert vars(EngineArgs) == members
    assert "add_cli_args" in vars(AsyncEngineArgs), "the subclass was not touched"


def test_entry_point_is_installed():
    """vLLM finds the plugin by its entry point."""
    (entry,) = entry_points(group="vllm.general_plugins", name="fastserve")
    assert entry.load() is register


def test_nothing_is_selected_by_default(engine_args):
    """Without the flag there is neither scheduler class nor connector."""
    args = engine_args("--max-num-seqs", "4")
    assert args.scheduler_cls is None
    assert args.kv_transfer_config is None


def test_package_imports_no_vllm(subprocess_env):
    """`import fastserve_vllm` costs nothing: vLLM and torch come with first use."""
    code = (
        "import sys, fastserve_vllm, fastserve_vllm.plugin, fastserve_vllm.config\n"
        "fastserve_vllm.FastServeConfig, fastserve_vllm.select\n"
        "print(sorted({'vllm', 'torch', 'prometheus_client'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=subprocess_env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
