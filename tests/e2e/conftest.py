"""Real engines, shared by the end-to-end tests."""

import openai
import pytest
import vllm
from serving import serving
from tiny_engine import running, workload

from benchmarks.plugins import plugin_environment

# A decode takes 57 ms, which leaves the API server of a busy machine the time to send each token.
PACE = 40


@pytest.fixture(scope="session")
def requests():
    """The workload whose greedy output every engine must reproduce."""
    return workload()


@pytest.fixture(scope="session")
def stock_tokens(tiny_model, requests):
    """What stock vLLM generates for it."""
    with running(vllm.LLM, tiny_model, max_num_seqs=32) as llm:
        return requests.generate(llm)


@pytest.fixture(scope="session")
def server(tiny_model, subprocess_env, tmp_path_factory):
    """`vllm serve --scheduler fastserve` with four batch places."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    flags = ["--scheduler", "fastserve", "--fastserve-config.base_quantum_s", "0.002"]
    # vLLM compiles its ranking of logprobs at first use: ten seconds, for nothing that is tested.
    env = subprocess_env | {"TORCHDYNAMO_DISABLE": "1"}
    with serving(tiny_model, [*flags, "--max-num-seqs", "4"], env, log) as server:
        yield server


@pytest.fixture(scope="module")
def paced_server(tiny_model, subprocess_env, tmp_path_factory):
    """One whose steps take their time, scheduled one ahead as on an accelerator."""
    folder = tmp_path_factory.mktemp("paced")
    env = subprocess_env | plugin_environment(folder, PACE)
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with serving(tiny_model, ["--scheduler", "fastserve"], env, folder / "server.log") as server:
        yield server


@pytest.fixture
def client(server):
    """The official client, connected to the server; gives up instead of retrying."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server):
    """Likewise, for many requests at a time."""
    url = f"{server.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="-", max_retries=0) as client:
        yield client
