"""What real requests teach the last level, and who joins it at once."""

import pytest

pytestmark = pytest.mark.host_versions


def policy_of(engine):
    return engine.scheduler.planner.policy


def serve(engine, rounds=12):
    """Prompts of 20 tokens want 10 tokens, those of 300 want 60."""
    for number in range(rounds):
        engine.add(f"short-{number}", 20, 10)
        engine.add(f"long-{number}", 300, 60)
        engine.drain()


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_answers_that_end_teach(make_engine, async_scheduling):
    """By the lengths of their prompts; the figure is in the report."""
    engine = make_engine(async_scheduling=async_scheduling)
    assert policy_of(engine).lengths.explained == 0
    serve(engine)
    lengths = policy_of(engine).lengths
    assert lengths.explained > 0.5
    assert lengths.longer_s(20) < -0.01 < 0.01 < lengths.longer_s(300)


def test_who_is_expected_to_end_first_goes_first(make_engine):
    """Of two that come together and reach the last level together, of a batch of one.

    Without learning, the one that was first to come runs on.
    """
    order = {}
    for learns in (True, False):
        engine = make_engine(max_num_seqs=4, fastserve={"num_levels": 2, "learn_lengths": learns})
        serve(engine)
        engine.add("long", 300, 200)
        engine.add("short", 20, 200)
        for _ in range(20):
            engine.step()
        # Three urgent ones leave a single place.
        for number in range(3):
            engine.add(f"urgent-{number}", 5, 200, priority=-1)
        engine.step()
        order[learns] = [name for name in ("long", "short") if name in engine.step()]
    assert order == {True: ["short"], False: ["long"]}


def test_an_abort_while_it_waits_teaches_nothing(make_engine):
    """One that has run counts: it needed that much."""
    engine = make_engine(max_num_seqs=1, fastserve={"policy": "mlfq"})
    engine.add("runs", 10, 500)
    engine.step()
    engine.add("waits", 10, 500, priority=1)
    engine.step()
    engine.abort("waits")
    engine.step()
    assert policy_of(engine).lengths._all.weight == 0
    engine.abort("runs")
    for _ in range(2):
        engine.step()
    assert policy_of(engine).lengths._all.weight == 1


def test_first_tokens_beyond_their_share_join_the_last_level(make_engine):
    """And have their first tokens all the same, once ageing lets them."""
    engine = make_engine(
        max_num_seqs=2,
        fastserve={"first_token_share": 0.1, "max_token_gap_s": 0.1, "num_levels": 4},
    )
    # A prompt of 900 tokens takes 10 ms: of 100 ms, one has its share.
    for name in "abc":
        engine.add(name, 900, 300)
    assert [job.level for job in engine.scheduler.planner.jobs] == [2, 3, 3]
    engine.drain()
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == dict.fromkeys(
        "abc", 300
    )


@pytest.mark.parametrize("mode", ["recompute", "proactive"])
def test_who_needs_the_whole_device_starts_again(make_engine, mode):
    """vLLM's watermark is kept free beside others only, as in vLLM itself."""
    engine = make_engine(
        num_blocks=41,
        max_num_seqs=2,
        max_model_len=1280,
        watermark=0.2,
        fastserve={"swap_mode": mode},
    )
    engine.add("large", 1200, 60)
    engine.step()
    engine.add("urgent", 1000, 5, priority=-1)
    engine.drain(max_steps=500)
    assert {name: len(tokens) for name, tokens in engine.outputs.items()} == {
        "large": 60,
        "urgent": 5,
    }
