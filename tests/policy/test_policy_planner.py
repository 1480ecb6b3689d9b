"""Which jobs a step takes, as tables of steps. Jobs are named in the order of their arrival."""

import random

import pytest
from fake_host import Stage, make_job, names
from fake_swap import SwapStage

from fastserve_vllm.policy.ageing import RelativeAgeing
from fastserve_vllm.policy.base import Fcfs
from fastserve_vllm.policy.job import JobState
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder


def arrivals(stage: Stage, letters: str, **options: int) -> None:
    for letter in letters:
        stage.add(letter, **options)


def urgent(stage: Stage, name: str, **options: int):
    return stage.add(name, priority=-1, **options)


class TestOrder:
    def test_the_batch_is_the_first_jobs_of_the_order(self):
        """The batch fills up in the total order."""
        stage = Stage()
        arrivals(stage, "abcd")
        assert stage.step(batch_limit=3) == "a b c"

    def test_an_urgent_arrival_displaces_the_last_running_job(self):
        """A waiting job ahead of a running one takes its place, at once."""
        stage = Stage()
        arrivals(stage, "ab")
        assert stage.step(batch_limit=2) == "a b"
        urgent(stage, "z", output=2)
        assert [stage.step(batch_limit=2) for _ in range(3)] == ["z a", "z a", "a b"]

    def test_a_displaced_job_is_paused_with_its_kv_cache(self):
        """Leaving the batch costs nothing while memory lasts."""
        stage = Stage()
        stage.add("a", prompt=40)
        stage.step()
        urgent(stage, "z")
        stage.step(batch_limit=1)
        assert (names(stage.plan.started), names(stage.plan.paused)) == ("z", "a")
        assert stage.jobs["a"].state is JobState.PAUSED
        assert stage.jobs["a"].handle.blocks == 10

    def test_a_smaller_batch_limit_takes_from_the_tail(self):
        """A batch limit that falls pauses the last jobs."""
        stage = Stage()
        arrivals(stage, "abc")
        stage.step()
        assert stage.step(batch_limit=1) == "a"
        assert stage.step(batch_limit=0) == ""
        assert stage.step() == "a b c"

    def test_jobs_paused_together_are_promoted_first_to_run_first(self):
        """Those that wait equally long keep their order when there is one turn at a time."""
        ageing = RelativeAgeing(ratio=1.0, gap_s=5.0, limit_s=5.0, most_turns=1)
        policy = SkipJoinMlfq(QuantumLadder(1.0, num_levels=3), ageing=ageing)
        stage = Stage(policy)
        arrivals(stage, "abc", prompt=1024)
        stage.step(token_budget=1 << 20)
        stage.spend(1.0)
        stage.step()
        assert {job.level for job in stage.jobs.values()} == {1}
        urgent(stage, "z")
        stage.step(batch_limit=1)
        stage.spend(6.0)
        stage.step(batch_limit=1)
        assert [stage.jobs[name].turn_s is None for name in "abc"] == [False, True, True]


class TestMemory:
    def test_the_last_job_of_the_order_gives_up_its_kv_cache(self):
        """Where blocks run short, the job that would run last starts over."""
        stage = Stage(num_blocks=6)
        arrivals(stage, "abc", prompt=8)
        assert stage.step() == "a b c"
        assert stage.step() == "a b"
        assert names(stage.plan.recomputed) == "c"
        assert stage.jobs["c"].next_tokens == 9

    def test_nobody_takes_kv_cache_from_a_job_ahead(self):
        """A job that needs room waits for those ahead of it, however little they use."""
        stage = Stage(num_blocks=5)
        arrivals(stage, "ab", prompt=7)
        stage.step()
        stage.add("c", prompt=8)
        assert stage.step() == "a b"
        assert stage.planner.counters.declined == {"memory": 1}

    def test_an_arrival_ahead_takes_kv_cache_from_paused_jobs_first(self):
        """Victims are taken from the tail of the order, no more than are needed."""
        stage = Stage(num_blocks=6)
        arrivals(stage, "abc", prompt=6)
        stage.step()
        urgent(stage, "z", prompt=6)
        assert stage.step(batch_limit=2) == "z a"
        assert names(stage.plan.recomputed) == "c"
        assert names(stage.plan.paused) == "b"

    def test_kv_cache_that_a_step_in_flight_writes_stays(self):
        """A job whose blocks cannot be freed now is passed over as a victim."""
        stage = Stage(num_blocks=6)
        arrivals(stage, "abc", prompt=6)
        stage.step()
        stage.host.stalled.add(stage.jobs["c"])
        urgent(stage, "z", prompt=6)
        assert stage.step() == "z a c"
        assert names(stage.plan.recomputed) == "b"

    def test_no_prefill_overtakes_one_that_waits_for_memory(self):
        """A short prompt behind a long one does not take the memory that the long one needs."""
        stage = Stage(num_blocks=8)
        stage.add("a", prompt=20)
        stage.step()
        stage.add("b", prompt=16)
        stage.add("c", prompt=4)
        assert stage.step() == "a"

    def test_no_prefill_overtakes_another_of_the_same_step(self):
        """Nor does it where both were first to run when the step began."""
        stage = Stage(num_blocks=8)
        stage.add("a", prompt=20)
        stage.add("b", prompt=16)
        stage.add("c", prompt=4)
        assert stage.step() == "a"

    def test_a_job_with_loaded_kv_cache_passes_one_that_waits_for_memory(self):
        """Nobody can take its blocks before it has run."""
        stage = Stage(num_blocks=8)
        loaded = make_job("b", prompt=20, output=2)
        stage.planner.add_blocked(loaded)
        stage.add("a", prompt=16)
        loaded.handle.blocks, loaded.next_tokens = 5, 1
        stage.planner.unblock(loaded, now_s=0.0)
        assert [stage.step(batch_limit=1) for _ in range(2)] == ["b", "a"]

    def test_headroom_is_set_aside_once(self):
        """Two queued jobs need their blocks and one headroom, not two."""
        stage = Stage(num_blocks=5, headroom_blocks=1)
        arrivals(stage, "ab", prompt=8)
        assert stage.step() == "a b"

    def test_headroom_stays_free_when_a_queued_job_is_let_in(self):
        """A queued job that would use the headroom waits."""
        stage = Stage(num_blocks=4, headroom_blocks=1)
        arrivals(stage, "ab", prompt=8)
        assert stage.step() == "a"

    def test_who_starts_alone_needs_no_headroom(self):
        """A job that needs all of the device would never start otherwise."""
        stage = Stage(num_blocks=2, headroom_blocks=1)
        stage.add("a", prompt=8, output=1)
        assert stage.step() == "a"

    def test_cached_prompt_blocks_count_as_memory(self):
        """A prompt in the prefix cache costs few tokens, but its blocks are among the free ones."""
        stage = Stage(num_blocks=10)
        stage.add("a", prompt=12)
        stage.add("b", prompt=32, cached=31)
        assert stage.step() == "a"

    def test_slots_run_out_like_blocks(self):
        """Where pausing keeps a slot, a job ahead takes the slot of the last one."""
        stage = Stage(slots=2)
        arrivals(stage, "ab")
        stage.step()
        urgent(stage, "z")
        assert stage.step() == "z a"
        assert names(stage.plan.recomputed) == "b"
        stage.add("c")
        assert stage.step() == "z a"


class TestTokens:
    def test_the_prefill_that_gets_the_rest_comes_last(self):
        """A prefill that is cut short leaves a token to each decode behind it."""
        stage = Stage()
        stage.add("a")
        stage.add("b")
        stage.step()
        urgent(stage, "z", prompt=40)
        assert stage.step(token_budget=16) == "a b z"
        assert stage.jobs["z"].next_tokens == 26

    def test_nothing_queued_follows_a_running_prefill_that_is_cut_short(self):
        """vLLM serves running jobs first: no token would be left."""
        stage = Stage()
        stage.add("a", prompt=40)
        assert stage.step(token_budget=16) == "a"
        stage.add("b")
        assert stage.step(token_budget=16) == "a"

    def test_a_running_prefill_sits_out_where_a_queued_job_is_ahead(self):
        """It would take the tokens of the queued job, for vLLM serves it first."""
        stage = Stage()
        stage.add("a", prompt=40)
        stage.step(token_budget=16)
        urgent(stage, "z", prompt=8)
        assert stage.step(token_budget=16) == "z"
        assert stage.planner.counters.declined == {"tokens": 1}

    def test_a_prefill_is_never_split_without_chunking(self):
        """Without chunked prefill, a prompt runs whole or not at all."""
        stage = Stage()
        stage.add("a", prompt=10)
        stage.add("b", prompt=10)
        assert stage.step(token_budget=16, chunked_prefill=False) == "a"
        assert stage.step(token_budget=16, chunked_prefill=False) == "a b"

    def test_a_chunk_limit_leaves_tokens_to_other_prefills(self):
        """A prefill takes no more than its chunk."""
        stage = Stage()
        arrivals(stage, "abc", prompt=40)
        assert stage.step(token_budget=16, prefill_chunk=8) == "a b"

    def test_declined_jobs_end_the_walk(self):
        """A step looks no further than four declined jobs a batch place, plus four."""
        stage = Stage()
        for number in range(100):
            stage.add(f"long-{number}", prompt=32)
        stage.add("short", prompt=1)
        options = {"batch_limit": 3, "token_budget": 16, "chunked_prefill": False}
        assert stage.step(**options) == ""
        assert stage.planner.counters.declined == {"tokens": 16}


class TestAdapters:
    def test_a_step_holds_no_more_adapters_than_it_may(self):
        """A job whose adapter does not fit is passed over; one without any is not."""
        stage = Stage()
        for name, adapter in zip("abcde", [1, 2, 3, 1, 0], strict=True):
            stage.add(name, adapter=adapter)
        assert stage.step(max_adapters=2) == "a b d e"
        assert stage.planner.counters.declined == {"adapters": 1}


class TestStates:
    def test_a_job_with_nothing_to_compute_gives_up_its_place(self):
        """Where steps overlap, a place is not kept for a job whose last token is in flight."""
        stage = Stage()
        arrivals(stage, "abc")
        stage.step(batch_limit=2)
        stage.host.stalled.add(stage.jobs["a"])
        assert stage.step(batch_limit=2, overlapping=True) == "b c"
        stage.host.stalled.clear()
        assert stage.step(batch_limit=2, overlapping=True) == "a b"

    def test_the_displaced_return_where_the_newcomer_is_not_ready(self):
        """A job that is displaced by one with nothing to compute runs on."""
        stage = Stage()
        arrivals(stage, "ab")
        stage.step(batch_limit=2)
        stage.host.stalled.add(urgent(stage, "z"))
        assert stage.step(batch_limit=2, overlapping=True) == "a b"
        assert stage.plan.paused == ()

    def test_the_displaced_return_in_their_order(self):
        """Where one of two newcomers is not ready, the first of the displaced runs on."""
        stage = Stage()
        arrivals(stage, "ab")
        stage.step(batch_limit=2)
        urgent(stage, "y")
        stage.host.stalled.add(urgent(stage, "z"))
        assert stage.step(batch_limit=2, overlapping=True) == "y a"
        assert names(stage.plan.paused) == "b"

    def test_only_jobs_with_kv_cache_run_while_draining(self):
        """Nothing starts while the host admits nothing; what started goes on."""
        stage = Stage()
        arrivals(stage, "ab")
        stage.step(batch_limit=1)
        urgent(stage, "z")
        stage.step(batch_limit=1)
        assert stage.step(admit_queued=False) == "z a"
        assert stage.step() == "z a b"

    def test_a_blocked_job_does_not_run(self):
        """A blocked job takes no place; it joins anew when it is unblocked."""
        stage = Stage()
        arrivals(stage, "ab")
        stage.step()
        stage.host.drop(stage.jobs["a"])
        stage.planner.block(stage.jobs["a"])
        assert stage.step() == "b"
        stage.planner.unblock(stage.jobs["a"], stage.now_s)
        assert stage.step() == "b a"

    def test_a_job_that_the_host_missed_is_paused(self):
        """A resident that the host did not run waits; it comes back by its place in the order."""
        stage = Stage()
        arrivals(stage, "ab")
        stage.step()
        stage.planner.missed(stage.jobs["a"], stage.now_s)
        assert stage.planner.running == (stage.jobs["b"],)
        assert stage.step() == "a b"

    def test_a_demoted_job_may_leave_before_the_next_plan(self):
        """The planner forgets that its place had changed."""
        stage = Stage(SkipJoinMlfq(QuantumLadder(1.0)))
        arrivals(stage, "ab")
        stage.step()
        stage.planner.observe(1.5, 1.5)
        stage.planner.remove(stage.jobs["a"])
        plan = stage.planner.plan(
            stage.host.limits(stage.planner, batch_limit=2, token_budget=64), 1.5
        )
        assert plan.batch == (stage.jobs["b"],)

    def test_an_evicted_job_keeps_its_place(self):
        """A job whose KV cache the host took starts over at the place that it had."""
        stage = Stage()
        arrivals(stage, "ab")
        stage.step()
        stage.host.drop(stage.jobs["a"])
        stage.planner.evict(stage.jobs["a"], stage.now_s)
        assert stage.jobs["a"].state is JobState.QUEUED
        assert stage.step() == "a b"

    @pytest.mark.parametrize("state", [*JobState])
    def test_a_job_can_leave_in_any_state(self, state):
        """An abort works wherever the job is; a copy in flight gives its blocks back later."""
        stage = SwapStage(num_blocks=19, host_blocks=100, copy_steps=3)
        arrivals(stage, "abc", prompt=18)
        stage.step()
        stage.planner.add_blocked(make_job("d"))
        stage.host.leave(stage.jobs["a"])
        stage.planner.evict(stage.jobs["a"], stage.now_s, spilled=True)
        urgent(stage, "z", prompt=18)
        stage.step(batch_limit=1)
        stage.add("q")
        counts = stage.planner.roster.counts
        for _ in range(20):
            if counts()[state]:
                break
            stage.step(batch_limit=1)
        job = next(job for job in stage.planner.jobs if job.state is state)
        stage.planner.remove(job)
        stage.host.drop(job)
        stage.planner.check_integrity()
        assert counts()[state] == 0
        assert job.job_id not in stage.step().split()
        for _ in range(5):
            stage.step()
        held = sum(other.handle.blocks for other in stage.planner.jobs)
        assert stage.host.free_blocks(stage.planner) == 19 - held

    def test_every_arrow_is_counted(self):
        """Started, paused, recomputed and finished count what happened."""
        stage = Stage(num_blocks=6)
        arrivals(stage, "ab", prompt=6)
        stage.step()
        urgent(stage, "z", prompt=10, output=1)
        stage.step(batch_limit=1)
        stage.step(batch_limit=1)
        counters = stage.planner.counters
        assert (counters.started, counters.paused) == (4, 1)
        assert (counters.recomputed, counters.finished) == (1, 1)


class TestCost:
    """What a step looks at, counted on the jobs themselves: wall time would be noise."""

    QUEUED = 10_000
    BATCH = 16

    def crowd(self, watched_job, **host) -> Stage:
        ageing = RelativeAgeing(ratio=10.0, gap_s=1e5, limit_s=1e6, most_turns=4)
        stage = Stage(SkipJoinMlfq(QuantumLadder(1.0), ageing=ageing), **host)
        for number in range(self.QUEUED):
            job = watched_job(f"{number}", prompt_tokens=8, handle=make_job("", prompt=8).handle)
            job.next_tokens = 8
            stage.planner.add(job, now_s=0.0)
        return stage

    def plan(self, stage, watched_job, **options) -> int:
        """Plan a step; how many jobs that looks at."""
        limits = stage.host.limits(
            stage.planner, batch_limit=self.BATCH, **{"token_budget": 4096, **options}
        )
        stage.host.calls = 0
        watched_job.touched.clear()
        stage.plan = stage.planner.plan(limits, 0.0)
        return len(watched_job.touched)

    def observe(self, stage, watched_job, step_s) -> int:
        """Charge a step; how many jobs that looks at."""
        watched_job.touched.clear()
        stage.planner.observe(step_s, 0.0)
        return len(watched_job.touched)

    def test_a_plan_looks_at_few_of_the_queued(self, watched_job):
        """The first step looks at the jobs that it starts, not at the queue."""
        stage = self.crowd(watched_job)
        assert self.plan(stage, watched_job) <= 2 * self.BATCH
        assert len(stage.plan.batch) == self.BATCH

    def test_a_steady_step_looks_at_the_batch_only(self, watched_job):
        """A step that changes nothing looks at the batch and the head of the queue."""
        stage = self.crowd(watched_job)
        self.plan(stage, watched_job)
        # That they wait no more is noticed once.
        assert self.observe(stage, watched_job, 1e-6) <= self.BATCH + 2
        assert self.observe(stage, watched_job, 1e-6) <= 2
        assert self.plan(stage, watched_job) <= self.BATCH + 2

    @pytest.mark.parametrize(
        ("host", "options"),
        [
            ({"num_blocks": 20}, {}),
            ({"slots": 4}, {}),
            ({}, {"token_budget": 16}),
            ({}, {"token_budget": 7, "chunked_prefill": False}),
            ({}, {"max_adapters": 1}),
            ({}, {"admit_queued": False}),
            ({}, {"overlapping": True}),
        ],
    )
    def test_a_tight_plan_looks_at_few_of_the_queued(self, watched_job, host, options):
        """Where a limit binds, a plan looks at some jobs a batch place, however long the queue."""
        stage = self.crowd(watched_job, **host)
        assert self.plan(stage, watched_job, **options) <= 6 * (self.BATCH + 1)
        assert stage.host.calls <= 24 * (self.BATCH + 1)

    def test_a_plan_that_takes_memory_looks_at_few_of_the_queued(self, watched_job):
        """Those behind whoever gives up its KV cache get none of it, so they are not looked at."""
        stage = self.crowd(watched_job, num_blocks=20)
        self.plan(stage, watched_job)
        stage.host.run(
            stage.plan,
            stage.planner,
            stage.host.limits(stage.planner, batch_limit=self.BATCH, token_budget=4096),
            (),
        )
        urgent(stage, "z", prompt=40)
        assert self.plan(stage, watched_job) <= 6 * (self.BATCH + 1)
        assert stage.plan.recomputed

    def test_charging_looks_at_the_demoted_only(self, watched_job):
        """A step is charged to the whole batch by looking at the jobs whose quantum is used up."""
        stage = self.crowd(watched_job)
        self.plan(stage, watched_job)
        self.observe(stage, watched_job, 0.0)
        assert self.observe(stage, watched_job, 0.25) <= 2
        assert self.observe(stage, watched_job, 0.75) <= self.BATCH + 2
        assert {job.level for job in stage.planner.running} == {1}

    def test_turns_are_given_by_looking_at_those_who_are_due(self, watched_job):
        """However many wait, a step looks at whom it gives a turn."""
        stage = self.crowd(watched_job)
        self.plan(stage, watched_job)
        # What is due first is looked at once, to learn its patience.
        stage.planner.observe(0.0, 1e5)
        watched_job.touched.clear()
        stage.planner.observe(0.0, 2e5)
        assert stage.planner.policy.turns == 4
        assert len(watched_job.touched) <= 8

    def test_keys_are_compared_a_logarithmic_number_of_times(self):
        """Ten times the queue costs a step a few comparisons more."""
        costs = {}
        for queued in (1000, 10_000):
            stage = Stage(CountedOrder())
            for number in range(queued):
                stage.add(f"{number}")
            Place.comparisons = 0
            stage.planner.plan(stage.host.limits(stage.planner, batch_limit=16, token_budget=64), 0)
            costs[queued] = Place.comparisons
        assert 0 < costs[10_000] <= 2 * costs[1000] <= 2 * 16 * 20


class Place(float):
    """A number in a key that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other):
        Place.comparisons += 1
        return float(self) < float(other)


class CountedOrder(Fcfs):
    """Arrival order, with keys that count."""

    def key(self, job):
        return (Place(job.arrival),)


class TestTwins:
    """Requests that arrived in one step and were served alike, with times that are not exact."""

    @pytest.mark.parametrize("seed", range(12))
    def test_who_starts_is_in_the_batch_and_not_paused(self, seed):
        """However their places round, a job does not join and leave in one step."""
        draw = random.Random(seed)
        ladder = QuantumLadder(0.0031, 2.1, 3)
        ageing = RelativeAgeing(ratio=10, gap_s=0.05, limit_s=0.4, most_turns=2)
        stage = Stage(SkipJoinMlfq(ladder, ageing=ageing, service_weight=50.0))
        for number in range(400):
            if number % 3 == 0 and number < 90:
                for twin in "ab":
                    stage.add(f"{number}{twin}", output=300)
            stage.step(batch_limit=5)
            started, paused = set(stage.plan.started), set(stage.plan.paused)
            assert started <= set(stage.plan.batch)
            assert not started & paused
            stage.spend(0.0014 + 0.00003 * draw.randint(1, 5))
