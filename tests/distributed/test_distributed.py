"""Two tensor-parallel workers over HTTP; `make distributed` runs every other way, too."""

import asyncio

import pytest
from driving import copies_of, held_blocks, tokens_of, total, wait_until_idle
from failing import fail
from layouts import FASTSERVE, LAYOUTS, PRESSURE
from serving import serving
from tables import PAGE, filled
from tiny_engine import running, workload

(TENSOR,) = (layout for layout in LAYOUTS if str(layout) == "tensor parallel 2, mp")


@pytest.fixture(scope="module")
def requests():
    """Many more than the batch holds."""
    return workload(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where workers are told to hold a copy."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def server(tiny_model, subprocess_env, folder):
    """Two workers, short of KV cache; blocks are ruined before they are refilled."""
    variables = {"FASTSERVE_TEST_POISON": "1", "FASTSERVE_TEST_HOLD": str(folder)}
    env = TENSOR.environment(subprocess_env, **variables)
    flags = [*PRESSURE, *TENSOR.flags, *FASTSERVE]
    with serving(tiny_model, flags, env, folder / "server.log") as server:
        yield server


def test_every_worker_copies_its_shard(server, tiny_model, requests):
    """Tokens are those of one worker, all workers copied as often, and nothing stays behind."""
    import vllm

    with running(vllm.LLM, tiny_model, max_num_seqs=32) as llm:
        expected = requests.generate(llm)
    assert asyncio.run(tokens_of(server, requests)) == expected
    wait_until_idle(server)
    copies = copies_of(server)
    assert copies["0", 0, "out"] == copies["0", 1, "out"] > 10
    assert copies["0", 0, "in"] == copies["0", 1, "in"] > 10
    assert total(server, "vllm:fastserve_copies_failed_total") == 0
    assert held_blocks(server) == 0


async def test_a_worker_that_dies_in_mid_copy_ends_the_engine(server, folder, requests):
    """With vLLM's own error, soon; every request is answered or refused. Ends the server."""
    end = await fail(server, "killed", folder, requests)
    assert {"EngineDeadError", "died unexpectedly"} <= set(end["errors"])
    assert end["refused"] > 0
    assert end["seconds"] < 60


def test_the_page_shows_the_results():
    """`python tests/distributed/tables.py` would change nothing in docs/distributed.md."""
    assert filled(PAGE.read_text()) == PAGE.read_text()
