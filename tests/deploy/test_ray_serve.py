"""Ray Serve: the app serves from two replicas on CPU cores, and the config file says the same."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from serving import free_port
from tiny_engine import ENGINE_ARGS
from vllm.engine.arg_utils import AsyncEngineArgs

from fastserve_vllm import FastServeConfig, engine_overrides
from fastserve_vllm.selection import CONFIG_KEY

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve"
REPLICAS = 2
START_TIMEOUT_S = 900
LOG_TIMEOUT_S = 120

pytest.importorskip("ray.serve.llm", reason="Ray Serve's LLM API is not installed")


@pytest.fixture
def served(subprocess_env, tiny_model, tmp_path):
    """(url, Ray's folder) of the app once it is ready; stopped as a user would."""
    port, log = free_port(), tmp_path / "log.txt"
    # Ray's sockets lie in its folder, and a socket's path is short.
    ray_files = Path(tempfile.mkdtemp(prefix="ray-"))
    flags = ["--model", str(tiny_model), "--replicas", str(REPLICAS), "--cpu", "--port", str(port)]
    flags += ["--engine", json.dumps(ENGINE_ARGS), "--fastserve", '{"num_levels": 5}']
    env = subprocess_env | {"RAY_TMPDIR": str(ray_files), "RAY_USAGE_STATS_ENABLED": "0"}
    # Tests before this one may have silenced vLLM, whose words are read here.
    env["VLLM_LOGGING_LEVEL"] = "INFO"
    with log.open("w") as file:
        program = [sys.executable, EXAMPLE / "app.py", *flags]
        process = subprocess.Popen(program, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "ready: " not in log.read_text():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", ray_files
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        shutil.rmtree(ray_files, ignore_errors=True)


def complete(url, prompt):
    body = {"model": "model", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)["choices"][0]["text"]


def test_two_replicas_serve(served):
    """Both run FastServe, both get requests, and their greedy answers are the same."""
    url, ray_files = served
    prompts = [f"Question {number % 4}" for number in range(24)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(url, prompt), prompts))
    assert len(set(zip(prompts, answers, strict=True))) == 4
    # What the replicas' processes wrote themselves: what Ray passes on may come late, or never.
    deadline = time.monotonic() + LOG_TIMEOUT_S
    while sum((calls := written(ray_files, "CALL completions OK")).values()) < len(prompts):
        assert time.monotonic() < deadline, calls
        time.sleep(0.5)
    assert len(calls) == REPLICAS
    assert sum(calls.values()) == len(prompts)
    assert written(ray_files, "custom scheduler class fastserve_vllm").keys() == calls.keys()


def written(ray_files, words):
    """How often each of Ray's workers wrote these words; a worker's engine writes where it does."""
    counts = Counter()
    for path in ray_files.glob("ray/session_latest/logs/worker-*"):
        counts[path.stem] += path.read_text(errors="replace").count(words)
    return +counts


class TestConfigFile:
    @pytest.fixture
    def config(self):
        return yaml.safe_load((EXAMPLE / "config.yaml").read_text())

    @pytest.fixture
    def llm(self, config):
        (application,) = config["applications"]
        assert application["import_path"] == "ray.serve.llm:build_openai_app"
        (llm,) = application["args"]["llm_configs"]
        return llm

    def test_ray_accepts_it(self, config, llm):
        """Ray Serve's schema of config files, and that of its LLM API."""
        from ray.serve.llm import LLMConfig
        from ray.serve.schema import ServeDeploySchema

        ServeDeploySchema.model_validate(config)
        assert LLMConfig(**llm).deployment_config["num_replicas"] == REPLICAS

    def test_it_selects_fastserve(self, llm):
        """The same as `engine_overrides` does, but for the configuration's defaults."""
        arguments = llm["engine_kwargs"]
        transfer = arguments["kv_transfer_config"]
        own = transfer["kv_connector_extra_config"].pop(CONFIG_KEY)
        expected = engine_overrides(own)
        complete_one = expected["kv_transfer_config"]["kv_connector_extra_config"].pop(CONFIG_KEY)
        assert FastServeConfig.parse(own).to_dict() == complete_one
        assert {name: arguments[name] for name in expected} == expected

    def test_vllm_accepts_it(self, llm, tiny_model):
        """Each key is an engine argument, and FastServe's configuration arrives in vLLM's."""
        from ray.llm._internal.serve.engines.vllm.vllm_engine import _get_vllm_engine_config
        from ray.serve.llm import LLMConfig

        llm["model_loading_config"]["model_source"] = str(tiny_model)
        llm["engine_kwargs"] |= ENGINE_ARGS | {"max_num_active_seqs": 2, "max_num_seqs": 4}
        args, config = _get_vllm_engine_config(LLMConfig(**llm, accelerator_config={"kind": "cpu"}))
        assert isinstance(args, AsyncEngineArgs)
        extra = config.kv_transfer_config.kv_connector_extra_config
        assert FastServeConfig.parse(extra[CONFIG_KEY]).swap_space_gib == 16
