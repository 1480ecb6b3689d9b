"""`--scheduler` and `--fastserve-config` on vLLM's own command line."""

import argparse
import json
import pickle
import subprocess
import sys

import pytest
import vllm
import yaml
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.selection import SCHEDULER_CLASS

COMMANDS = [("serve",), ("bench", "latency"), ("bench", "throughput")]


def config_of(engine_args):
    """The FastServe configuration inside engine arguments."""
    extra = engine_args.kv_transfer_config.kv_connector_extra_config
    return FastServeConfig.parse(extra["fastserve"])


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_scheduler_flag_selects_fastserve(engine_args, command):
    """The scheduler class and the connector are set, the configuration is the default one."""
    args = engine_args("--scheduler", "fastserve", command=command)
    assert args.scheduler_cls == SCHEDULER_CLASS
    assert args.kv_transfer_config.kv_connector == "FastServeConnector"
    assert config_of(args) == FastServeConfig()


def test_connector_is_no_consumer(engine_args):
    """A consumer would make vLLM hold freed blocks back and accept clients' embeddings."""
    transfer = engine_args("--scheduler", "fastserve").kv_transfer_config
    assert transfer.is_kv_transfer_instance
    assert not transfer.is_kv_consumer


@pytest.mark.parametrize(
    "flags",
    [
        ["--fastserve-config.num_levels", "6", "--fastserve-config.starvation_limit_s", "0.5"],
        ["--fastserve-config.num_levels=6", "--fastserve-config.starvation_limit_s=0.5"],
        ["--fastserve_config.num_levels", "6", "--fastserve_config.starvation_limit_s", "0.5"],
        ["--fastserve-config", '{"num_levels": 6, "starvation_limit_s": 0.5}'],
    ],
    ids=["dotted", "dotted with =", "underscores", "JSON"],
)
def test_configuration_flags(engine_args, flags):
    """Keys are set by dots or as JSON, as for vLLM's own configurations."""
    args = engine_args("--scheduler=fastserve", *flags)
    assert config_of(args) == FastServeConfig(num_levels=6, starvation_limit_s=0.5)


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--fastserve-config.starvation_limit_s=null", "starvation_limit_s", None),
        ("--fastserve-config.policy=mlfq", "policy", "mlfq"),
        ("--fastserve-config.quantum_ratio=3", "quantum_ratio", 3.0),
        ("--fastserve-config.base_quantum_s=1e-3", "base_quantum_s", 0.001),
    ],
)
def test_values_of_every_type(engine_args, flag, field, value):
    """None, text, whole numbers where fractions are meant, and scientific notation."""
    assert getattr(config_of(engine_args("--scheduler=fastserve", flag)), field) == value


@pytest.mark.parametrize("nested", [True, False])
def test_yaml_config_file(engine_args, tmp_path, nested):
    """A `--config` file takes both flags; the command line overrides it."""
    path = tmp_path / "serve.yaml"
    config = {"num_levels": 6} if nested else '{"num_levels": 6}'
    path.write_text(yaml.safe_dump({"scheduler": "fastserve", "fastserve-config": config}))
    assert config_of(engine_args("--config", str(path))).num_levels == 6
    args = engine_args("--config", str(path), "--fastserve-config.num_levels", "7")
    assert config_of(args).num_levels == 7


def test_other_flags_keep_working(engine_args):
    """What else is on the command line reaches the engine arguments."""
    args = engine_args(
        "--scheduler", "fastserve", "--max-num-seqs", "7", "--scheduling-policy=fcfs"
    )
    assert (args.max_num_seqs, args.scheduling_policy) == (7, "fcfs")


def fails(capsys, call, *words):
    """Assert that `call` ends the program with status 2 and a message that has all `words`."""
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


BAD_CONFIGS = {
    "unknown key": ("levels", "4", ["fastserve_config.levels", "num_levels"]),
    "key with dashes": ("num-levels", "4", ["fastserve_config.num-levels", "num_levels"]),
    "negative": ("base_quantum_s", "-1", ["fastserve_config.base_quantum_s", "greater than 0"]),
    "zero": ("starvation_limit_s", "0", ["fastserve_config.starvation_limit_s", "greater than 0"]),
    "NaN": ("base_quantum_s", "NaN", ["fastserve_config.base_quantum_s", "finite"]),
    "Infinity": ("base_quantum_s", "Infinity", ["fastserve_config.base_quantum_s", "finite"]),
    "inf": ("base_quantum_s", "inf", ["fastserve_config.base_quantum_s", "number"]),
    "ratio 1": ("quantum_ratio", "1", ["fastserve_config.quantum_ratio", "greater than 1"]),
    "text": ("num_levels", "many", ["fastserve_config.num_levels", "integer", "many"]),
    "fraction": ("num_levels", "2.5", ["fastserve_config.num_levels", "integer"]),
    "boolean": ("num_levels", "true", ["fastserve_config.num_levels", "integer"]),
    "boolean seconds": ("base_quantum_s", "true", ["fastserve_config.base_quantum_s", "number"]),
    "too many": ("num_levels", "65", ["fastserve_config.num_levels", "64"]),
    "policy": ("policy", "lifo", ["fastserve_config.policy", "fixed-priority", "lifo"]),
    "nested": ("policy.name", "mlfq", ["fastserve_config.policy", "fixed-priority"]),
}


@pytest.mark.parametrize(("key", "value", "words"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_bad_configuration_is_refused(parser, capsys, key, value, words):
    """Status 2 while parsing; the message names the field and what it accepts."""
    flags = ["serve", "m", "--scheduler", "fastserve", f"--fastserve-config.{key}", value]
    fails(capsys, lambda: parser.parse_args(flags), "--fastserve-config", *words)


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '"fastserve"', ""])
def test_configuration_that_is_no_object_is_refused(parser, capsys, text):
    """Only a JSON object is a configuration."""
    flags = ["serve", "m", "--scheduler", "fastserve", "--fastserve-config", text]
    fails(capsys, lambda: parser.parse_args(flags), "--fastserve-config", "JSON")


def test_unknown_scheduler_is_refused(parser, capsys):
    """The message lists what there is."""
    flags = ["serve", "m", "--scheduler", "fair"]
    fails(capsys, lambda: parser.parse_args(flags), "--scheduler", "fair", "fastserve")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:Any", ["no_such_module cannot be imported"]),
        ("json:Nothing", ["json has no class Nothing"]),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused(engine_args, capsys, name, words):
    """Before a model is loaded, not when an engine's process looks for it."""
    flags = ["--scheduler", "fastserve", "--fastserve-config.policy", name]
    fails(capsys, lambda: engine_args(*flags), "fastserve_config.policy", *words)


def test_conflict_with_scheduler_cls_is_refused(engine_args, capsys):
    """Two schedulers cannot both be meant."""
    flags = ["--scheduler", "fastserve", "--scheduler-cls", "my.Scheduler"]
    fails(capsys, lambda: engine_args(*flags), "--scheduler-cls my.Scheduler", "exclude")


def test_configuration_without_scheduler_is_refused(engine_args, capsys):
    """A configuration that would have no effect is a mistake."""
    flags = ["--fastserve-config.num_levels", "4"]
    fails(capsys, lambda: engine_args(*flags), "--fastserve-config", "--scheduler fastserve")


def test_kv_offloading_size_is_refused(engine_args, capsys):
    """It would replace FastServe's connector behind its back; the message says what to do."""
    flags = ["--scheduler", "fastserve", "--kv-offloading-size", "4"]
    fails(capsys, lambda: engine_args(*flags), "--kv-offloading-size", "--kv-transfer-config")


def test_unsupported_host_is_refused(engine_args, capsys, monkeypatch):
    """Before a model is loaded; the versions that would do are in the message."""
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    fails(capsys, lambda: engine_args("--scheduler", "fastserve"), "0.34.0", ">=0.32,<0.34")
    assert engine_args("--max-num-seqs", "4").scheduler_cls is None


def test_namespace_applied_once_in_every_process(namespace):
    """API server processes read the parsed arguments again, pickled: the result is the same."""
    args = namespace("--scheduler", "fastserve")
    first = AsyncEngineArgs.from_cli_args(args)
    copy = pickle.loads(pickle.dumps(args))
    assert isinstance(copy, argparse.Namespace)
    for namespace in (args, copy):
        again = AsyncEngineArgs.from_cli_args(namespace)
        assert again.scheduler_cls == first.scheduler_cls
        assert again.kv_transfer_config == first.kv_transfer_config


def test_namespace_can_be_pickled_before_it_is_read(namespace):
    """A configuration survives the way to another process unread."""
    flags = ["--scheduler", "fastserve", "--fastserve-config.num_levels", "5"]
    args = pickle.loads(pickle.dumps(namespace(*flags)))
    assert config_of(AsyncEngineArgs.from_cli_args(args)).num_levels == 5


@pytest.mark.parametrize(
    "theirs",
    [
        {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "engine_id": "mine"},
        {
            "kv_connector": "Custom",
            "kv_connector_module_path": "my.module",
            "kv_role": "kv_producer",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"path": "/x"},
        },
    ],
    ids=["registered", "out of tree"],
)
def test_users_connector_is_composed(engine_args, theirs):
    """Ours and theirs become children of a MultiConnector, which keeps their id and policies."""
    args = engine_args("--scheduler=fastserve", "--kv-transfer-config", json.dumps(theirs))
    parent = args.kv_transfer_config
    assert parent.kv_connector == "MultiConnector"
    assert parent.kv_connector_module_path is None
    assert parent.kv_role == theirs["kv_role"]
    assert parent.engine_id == theirs.get("engine_id", parent.engine_id)
    assert parent.kv_load_failure_policy == theirs.get("kv_load_failure_policy", "fail")
    ours, child = parent.kv_connector_extra_config["connectors"]
    assert ours["kv_connector"] == "FastServeConnector"
    assert FastServeConfig.parse(ours["kv_connector_extra_config"]["fastserve"])
    # MultiConnector hands its own engine id down.
    rebuilt = KVTransferConfig(**child, engine_id=parent.engine_id)
    expected = KVTransferConfig(**{**theirs, "engine_id": parent.engine_id})
    assert rebuilt == expected


def test_users_multi_connector_gains_a_child(engine_args):
    """Their children and settings stay as they are."""
    child = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    theirs = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [child], "other": 1},
    }
    args = engine_args("--scheduler=fastserve", "--kv-transfer-config", json.dumps(theirs))
    extra = args.kv_transfer_config.kv_connector_extra_config
    assert extra["other"] == 1
    assert [c["kv_connector"] for c in extra["connectors"]] == [
        "FastServeConnector",
        "ExampleConnector",
    ]
    assert extra["connectors"][1] == child


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scheduler", "fair"], ["--scheduler", "fair"]),
        (["--scheduler", "fastserve", "--scheduler-cls", "a.B"], ["--scheduler-cls a.B"]),
    ],
    ids=["while parsing", "after parsing"],
)
def test_real_command_ends_with_status_2(subprocess_env, tiny_model, flags, words):
    """`vllm serve` itself says why it does not start, without a traceback."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", tiny_model, *flags]
    done = subprocess.run(
        command, env=subprocess_env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
