"""ENST, who leaves and who comes back ahead of need, and the room that is kept for arrivals."""

import math
import random
from collections import Counter

import pytest
from fake_host import make_job
from fake_swap import SwapStage
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import by_key, naive_enst_s, naive_execute_s, naive_patience_s

from fastserve_vllm.policy.ageing import AbsoluteAgeing, Ageing, RelativeAgeing
from fastserve_vllm.policy.base import Fcfs, FixedPriority
from fastserve_vllm.policy.budget import StepLimits
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder
from fastserve_vllm.policy.queues import ReadyQueue
from fastserve_vllm.policy.room import BurstReserve, EventRate, Room
from fastserve_vllm.policy.swap import SwapDecision, SwapPlanner

seeds = st.integers(0, 1 << 30)


def join_at(policy: SkipJoinMlfq, level: int, now_s: float = 0.0, priority: int = 0) -> Job:
    """A waiting job of that level."""
    job = make_job(f"{sum(policy.level_sizes)}", priority=priority)
    job.first_step_s = 0.0
    policy.join(job, now_s)
    # Nobody joins the last level.
    policy._move(job, level)
    job.first_step_s = policy.ladder.base_s * policy.ladder.ratio**level
    return job


class TestEnst:
    def test_a_small_example(self):
        """Quanta 1, 2, 4 s and a batch of 2; two jobs at level 0, one at 1, one at 2, one at 3.

        Level 0 waits for nobody. Level 1 waits until both of level 0 have had 1 s: 2 * 1 / 2.
        Level 2: both have 1 + 2 s, the one of level 1 has 2 s: (2 * 3 + 2) / 2. Level 3: 1 + 2 + 4
        twice, 2 + 4, and 4: (14 + 6 + 4) / 2.
        """
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4))
        for level in (0, 0, 1, 2, 3):
            join_at(policy, level)
        assert policy.execute_s(2) == [0.0, 1.0, 4.0, 12.0]

    def test_nobody_above_is_nothing_to_wait_for(self):
        """Jobs of the same level and of those below count for nothing."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4))
        for level in (2, 2, 3):
            join_at(policy, level)
        assert policy.execute_s(1) == [0.0, 0.0, 0.0, 8.0]

    def test_promotion_comes_first_where_it_is_sooner(self):
        """ENST is the smaller of both times; a promotion that is overdue is now."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4), ageing=AbsoluteAgeing(5.0))
        swap, _, swapped = make_swap(policy)
        for _ in range(4):
            join_at(policy, 0)
        job = wait(join_at(policy, 2, now_s=1.0), JobState.SWAPPED)
        swapped.push(job)
        enst_s = []
        for now_s in (1.0, 4.0, 6.0, 9.0):
            swap.decide((), Room(0), now_s)
            enst_s.append(swap.enst_s(job))
        assert enst_s == [5.0, 2.0, 0.0, 0.0]
        policy.ageing = None
        swap.decide((), Room(0), 9.0)
        assert (policy.promote_s(job, 9.0), swap.enst_s(job)) == (math.inf, 12.0)

    def test_patience_grows_with_what_a_turn_would_move(self):
        """Where KV cache has to move, a second of service is worth ten of waiting; to a limit."""
        ageing = RelativeAgeing(ratio=10.0, gap_s=2.0, limit_s=50.0, most_turns=1)
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4), ageing=ageing)
        job = join_at(policy, 0)
        job.first_step_s = 0.25
        waits = []
        for state, served_s in [("PAUSED", 3.0), ("SWAPPED", 3.0), ("SWAPPED", 0.0)]:
            wait(job, JobState[state]).served_s = served_s
            waits.append(policy.promote_s(job, 1.0))
        job.served_s = 6.0
        waits.append(policy.promote_s(job, 1.0))
        wait(job, JobState.QUEUED).first_step_s = 0.5
        job.served_s = 0.0
        waits.append(policy.promote_s(job, 1.0))
        assert waits == [2.0 - 1, 30.0 - 1, 2.0 - 1, 50.0 - 1, 5.0 - 1]

    def test_who_has_a_turn_is_scheduled_now(self):
        """Its ENST is 0, on the host too, and it is owed its turn whatever the copies cost."""
        ageing = RelativeAgeing(ratio=0.0, gap_s=2.0, limit_s=9.0, most_turns=1)
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4), ageing=ageing)
        swap, _, swapped = make_swap(policy)
        for _ in range(4):
            join_at(policy, 0)
        job = wait(join_at(policy, 2, now_s=-1.0), JobState.SWAPPED)
        swapped.push(job)
        assert policy.promote_starved(1.0) == [job]
        swap.decide((), Room(0), 1.0)
        assert (swap.enst_s(job), policy.turn_left_s(job)) == (0.0, math.inf)
        policy.start(job)
        assert swap.enst_s(wait(job, JobState.RUNNING)) == 0.0

    @settings(max_examples=100)
    @given(seed=seeds)
    def test_it_is_the_formula_of_the_paper(self, seed):
        """Any ladder, any levels, any batch: the double sum, and the time until promotion."""
        dice = random.Random(seed)
        num_levels = dice.randint(1, 8)
        ladder = QuantumLadder(dice.choice([0.01, 1.0, 3.0]), dice.choice([1.5, 2.0]), num_levels)
        ageing = random_ageing(dice)
        policy = SkipJoinMlfq(ladder, ageing=ageing)
        jobs = [
            join_at(policy, dice.randrange(num_levels), float(dice.randint(0, 30)))
            for _ in range(dice.randint(0, 30))
        ]
        for job in dice.sample(jobs, len(jobs) // 4):
            policy.leave(job)
            jobs.remove(job)
        batch = dice.randint(1, 9)
        times = policy.execute_s(batch)
        for level in range(num_levels):
            assert times[level] == pytest.approx(naive_execute_s(ladder, jobs, level, batch))
        for job in jobs:
            job.state = dice.choice([JobState.PAUSED, JobState.SWAPPED, JobState.QUEUED])
            job.served_s = float(dice.randint(0, 9))
            expected = math.inf
            if ageing is not None:
                patience_s = naive_patience_s(ageing, ladder.base_s, job, job.served_s)
                expected = patience_s - (40.0 - job.waiting_since_s)
            assert policy.promote_s(job, 40.0) == max(expected, 0.0)

    def test_policies_without_levels_know_none(self):
        """Arrival order alone decides where there is one level."""
        policy, job = Fcfs(), make_job("a")
        policy.join(job, 0.0)
        assert (policy.execute_s(4), policy.promote_s(job, 1e9)) == ((0.0,), math.inf)
        assert (policy.next_promoted(4), policy.turn_left_s(job)) == ((), math.inf)


def random_ageing(dice: random.Random) -> Ageing | None:
    """No ageing, the absolute rule, or the relative one; all times are exact."""
    relative = RelativeAgeing(
        ratio=dice.choice([0.0, 1.0, 4.0]),
        gap_s=dice.choice([0.5, 2.0]),
        limit_s=dice.choice([8.0, 64.0]),
        most_turns=dice.randint(1, 3),
        gap_quanta=dice.choice([0.0, 4.0]),
    )
    return dice.choice([None, AbsoluteAgeing(8.0), AbsoluteAgeing(64.0), relative, relative])


class Device:
    """A `SwapDemand`: every job is one block, and copies cost nothing. Counts the questions."""

    def __init__(self) -> None:
        self.calls = 0
        self.stuck: set[Job] = set()
        self.full = False
        self.wanted = 1
        self.copy_s = 0.0

    def new_blocks(self, job: Job) -> int:
        self.calls += 1
        return self.wanted

    def freed_blocks(self, job: Job) -> int | None:
        self.calls += 1
        return None if job in self.stuck else 1

    def out_s(self, job: Job) -> float:
        self.calls += 1
        return self.copy_s

    in_s = out_s

    def recompute_s(self, job: Job) -> float:
        self.calls += 1
        return 1.0

    def unsaved_blocks(self, job: Job) -> int:
        self.calls += 1
        return 1

    def has_host_room(self, job: Job) -> bool:
        self.calls += 1
        return not self.full


def make_swap(policy, demand=None, device_blocks: int = 1 << 20):
    """A swap planner and its two queues."""
    paused, swapped = ReadyQueue(), ReadyQueue()
    return (
        SwapPlanner(policy, demand or Device(), device_blocks, paused, swapped),
        paused,
        swapped,
    )


def wait(job: Job, state: JobState) -> Job:
    job.state = state
    return job


class Crowd:
    """Jobs on the device and on the host, whose queues have lived through random changes.

    Times are exact, so that those of the reference are equal and not just near.
    """

    def __init__(self, seed: int, *, classes: int = 2) -> None:
        self.dice = random.Random(seed)
        self.policy = SkipJoinMlfq(
            QuantumLadder(1.0, 2.0, self.dice.randint(1, 6)),
            ageing=random_ageing(self.dice),
            service_weight=self.dice.choice([0.0, 4.0]),
        )
        self.classes = classes
        self.demand = Device()
        self.swap, self.paused, self.swapped = make_swap(self.policy, self.demand)
        self.jobs: list[Job] = []
        self.running: list[Job] = []
        self.now_s = 0.0
        for _ in range(self.dice.choice([20, 400])):
            self.change()

    def change(self) -> None:
        """Something happens to some job."""
        self.now_s += self.dice.randint(0, 3) / 4
        happen = self.dice.choices(
            [self.arrive, self.run, self.stop, self.move, self.leave, self.promote, self.charge],
            [6, 3, 3, 3, 1, 1, 2],
        )
        happen[0]()

    def some(self, *states: JobState) -> list[Job]:
        found = [job for job in self.jobs if job.state in states]
        return self.dice.sample(found, min(len(found), 1))

    def arrive(self) -> None:
        level, priority = self.dice.randrange(self.policy.num_levels), 0
        priority = self.dice.randrange(self.classes)
        job = join_at(self.policy, level, self.now_s, priority)
        self.jobs.append(job)
        self.settle(job)

    def settle(self, job: Job) -> None:
        """It waits on the device."""
        job.state = JobState.PAUSED
        self.paused.push(job)
        self.swap.paused(job)

    def run(self) -> None:
        for job in self.some(JobState.PAUSED):
            self.paused.discard(job)
            self.policy.start(job)
            job.state = JobState.RUNNING

    def stop(self) -> None:
        for job in self.some(JobState.RUNNING):
            self.policy.stop(job, self.now_s)
            self.settle(job)

    def move(self) -> None:
        """To the host, or back from there."""
        for job in self.some(JobState.PAUSED, JobState.SWAPPED):
            if job.state is JobState.PAUSED:
                self.paused.discard(job)
                job.state = JobState.SWAPPED
                self.swapped.push(job)
            else:
                self.swapped.discard(job)
                self.settle(job)

    def leave(self) -> None:
        for job in self.some(*JobState):
            self.forget(job)

    def promote(self) -> None:
        for job in self.policy.promote_starved(self.now_s):
            job.ticket[-1].push(job)
            if job.state is JobState.PAUSED:
                self.swap.paused(job)

    def charge(self) -> None:
        self.policy.charge(self.dice.randint(1, 8) / 4)

    def batch(self) -> list[Job]:
        return sorted((j for j in self.jobs if j.state is JobState.RUNNING), key=by_key)

    def enst_s(self, job: Job, batch: int) -> float:
        return naive_enst_s(self.policy, self.jobs, job, batch, self.now_s)

    def forget(self, job: Job) -> None:
        self.policy.leave(job)
        self.paused.discard(job)
        self.swapped.discard(job)
        self.jobs.remove(job)

    def sent_away(self) -> list[Job]:
        """Who leaves for a job that goes before all others and needs more room than there is."""
        job = join_at(self.policy, 0, self.now_s, priority=-1)
        self.jobs.append(job)
        job.state = JobState.SWAPPED
        self.swapped.push(job)
        self.demand.wanted = 1 << 30
        self.expected = largest_first(self)
        self.enst_then = {j: self.enst_s(j, max(len(self.batch()), 1)) for j in self.jobs}
        gone = self.swap.decide(self.batch(), Room(0), self.now_s).swapped_out
        self.forget(job)
        return gone


def largest_first(crowd: Crowd) -> list[Job]:
    """All who may leave, the slow and obvious way; those that wait before those that run."""
    batch = crowd.batch()
    size = max(len(batch), 1)
    leavers = [job for job in crowd.jobs if job.state is JobState.PAUSED] + batch[1:]
    return sorted(
        leavers,
        key=lambda j: (j.priority, crowd.enst_s(j, size), j.state is JobState.PAUSED, j.key),
        reverse=True,
    )


def ranks(crowd: Crowd, jobs: list[Job]) -> list[object]:
    """What the order goes by. With promotion, ties within a level may fall either way."""
    tied = crowd.policy.ageing is not None
    return [(job.priority, crowd.enst_then[job], None if tied else job.key) for job in jobs]


class TestOrder:
    @settings(max_examples=100)
    @given(seed=seeds)
    def test_the_largest_enst_leaves_first(self, seed):
        """Of all jobs on the device, whatever happened to them before; priority goes first."""
        crowd = Crowd(seed)
        for _ in range(3):
            gone = crowd.sent_away()
            assert set(gone) == set(crowd.expected)
            assert ranks(crowd, gone) == ranks(crowd, crowd.expected)
            for job in gone:
                if job.state is JobState.RUNNING:
                    crowd.policy.stop(job, crowd.now_s)
                crowd.settle(job)
            for job in crowd.dice.sample(gone, len(gone) // 2):
                crowd.forget(job)
            for _ in range(10):
                crowd.change()

    @settings(max_examples=60)
    @given(seed=seeds)
    def test_the_smallest_enst_comes_back_first(self, seed):
        """Of all jobs on the host; a promotion counts once only three others come before it.

        Relative ageing looks at most jobs only once they may be due, so it knows who is due first
        roughly; nobody comes back who is due later than the first of the order.
        """
        crowd = Crowd(seed, classes=1)
        batch = crowd.batch()
        size = max(len(batch), 1)
        while away := [job for job in crowd.jobs if job.state is JobState.SWAPPED]:
            enst_s = {job: crowd.enst_s(job, size) for job in away}
            (back,) = crowd.swap.decide(batch, Room(1), crowd.now_s).swapped_in
            if isinstance(crowd.policy.ageing, RelativeAgeing):
                assert enst_s[back] <= enst_s[min(away, key=by_key)]
            elif set(crowd.policy.next_promoted(4)) & set(away):
                assert enst_s[back] == min(enst_s.values())
            else:
                assert back is min(away, key=by_key)
            crowd.forget(back)

    @settings(max_examples=50)
    @given(seed=seeds)
    def test_the_more_urgent_class_comes_back_first(self, seed):
        """Whatever the ENST is."""
        crowd = Crowd(seed, classes=3)
        away = [job for job in crowd.jobs if job.state is JobState.SWAPPED]
        back = crowd.swap.decide(crowd.batch(), Room(len(away)), crowd.now_s).swapped_in
        assert [job.priority for job in back] == sorted(job.priority for job in away)
        assert set(back) == set(away)

    def test_the_first_of_the_batch_never_leaves(self):
        """Whoever runs first goes on, so something always moves forward."""
        crowd = Crowd(3)
        crowd.run()
        first = crowd.batch()[0]
        assert first not in crowd.sent_away()

    def test_who_is_stuck_stays(self):
        """A job whose blocks a step in flight writes is passed over."""
        crowd = Crowd(5)
        crowd.demand.stuck = {job for job in crowd.jobs if job.level % 2}
        gone = crowd.sent_away()
        assert gone
        assert set(gone) == set(crowd.expected) - crowd.demand.stuck

    def test_a_drain_forgets_nobody(self):
        """Who waits on the device may leave it, however often the queues were emptied."""
        stage = SwapStage(num_blocks=46, host_blocks=100)
        for name in "rabc":
            stage.add(name, prompt=14)
        stage.step()
        for _ in range(100):
            stage.step(batch_limit=1)
            stage.step(batch_limit=0, admit_queued=False)
        stage.host.leave(stage.jobs["r"])
        stage.planner.evict(stage.jobs["r"], stage.now_s, spilled=True)
        stage.add("z", prompt=16, priority=-1)
        stage.step(batch_limit=1)
        counters = stage.planner.counters
        assert (counters.spilled, counters.recomputed) == (0, 0)
        assert stage.jobs["c"].state is JobState.SWAPPED


class TestCost:
    """Questions to the policy and the host, counted: wall time would be noise."""

    def decide(self, waiting: int, ageing: Ageing, *, idle_blocks: int) -> int:
        """Questions of one decision that moves a few of `waiting` jobs."""
        crowd = Crowd(1)
        crowd.policy = CountingMlfq(QuantumLadder(1.0, 2.0, 6), ageing=ageing)
        crowd.swap, crowd.paused, crowd.swapped = make_swap(crowd.policy, crowd.demand)
        for number in range(waiting):
            crowd.arrive()
            if number % 2:
                job = crowd.jobs[-1]
                crowd.paused.discard(job)
                job.state = JobState.SWAPPED
                crowd.swapped.push(job)
        last = join_at(crowd.policy, 5)
        crowd.settle(last)
        # The first question after a quiet time looks at everybody once.
        crowd.swap.times = crowd.policy.execute_s(1)
        crowd.swap._leavers.largest(())
        crowd.demand.calls = crowd.policy.calls = 0
        crowd.demand.wanted = 4
        decision = crowd.swap.decide((), Room(idle_blocks), 1.0)
        assert decision.swapped_in or decision.swapped_out
        return crowd.demand.calls + crowd.policy.calls

    @pytest.mark.parametrize("idle_blocks", [0, 8])
    @pytest.mark.parametrize(
        "ageing", [AbsoluteAgeing(64.0), RelativeAgeing(4.0, gap_s=2.0, limit_s=64.0, most_turns=3)]
    )
    def test_a_decision_asks_about_few_jobs(self, idle_blocks, ageing):
        """Twenty times the jobs on the host and on the device: as many questions."""
        few, many = (self.decide(n, ageing, idle_blocks=idle_blocks) for n in (1000, 20_000))
        assert 0 < many <= 1.1 * few
        assert few < 300

    def test_no_decision_asks_nothing(self):
        """Where nobody is on the host and memory is idle, there is nothing to decide."""
        policy = CountingMlfq(QuantumLadder(1.0, 2.0, 6), ageing=AbsoluteAgeing(64.0))
        demand = Device()
        swap, *_ = make_swap(policy, demand)
        assert swap.decide((), Room(4), 0.0) == SwapDecision()
        assert demand.calls == policy.calls == 0


class CountingMlfq(SkipJoinMlfq):
    """Counts the questions about single jobs."""

    calls = 0

    def promote_s(self, job: Job, now_s: float) -> float:
        self.calls += 1
        return super().promote_s(job, now_s)

    def turn_left_s(self, job: Job) -> float:
        self.calls += 1
        return super().turn_left_s(job)

    def next_promoted(self, limit: int):
        found = super().next_promoted(limit)
        self.calls += len(found)
        return found


class TestReserve:
    def blocks(self, reserve: BurstReserve, *arrivals: int) -> list[int]:
        """The reserve after each step."""
        readings = []
        for blocks in arrivals:
            reserve.step(blocks)
            readings.append(reserve.blocks)
        return readings

    def test_it_is_empty_where_nothing_arrives(self):
        """No constant is kept back."""
        assert self.blocks(BurstReserve(), *[0] * 10) == [0] * 10

    def test_it_follows_a_burst(self):
        """What arrives within the window adds up; an older arrival does not."""
        reserve = BurstReserve(window=3, half_life=1 << 60)
        assert self.blocks(reserve, 0, 5, 2, 1, 4) == [0, 5, 7, 8, 8]
        assert self.blocks(reserve, 9) == [14]

    def test_it_forgets_by_half(self):
        """Half of it is gone after a half-life, and all of it in the end."""
        reserve = BurstReserve(window=2, half_life=64)
        self.blocks(reserve, 128, 0)
        assert abs(self.blocks(reserve, *[0] * 64)[-1] - 64) <= 1
        assert self.blocks(reserve, *[0] * 640)[-1] == 0

    def test_a_smaller_burst_does_not_shrink_it(self):
        """The largest recent burst counts."""
        reserve = BurstReserve(window=2, half_life=1 << 60)
        assert self.blocks(reserve, 50, 0, 0, 3, 0)[-1] == 50

    def test_it_is_a_quarter_of_the_device_at_most(self):
        """However large a burst was."""
        swap, *_ = make_swap(SkipJoinMlfq(QuantumLadder(1.0)), device_blocks=100)
        swap.reserve.step(10_000)
        assert swap.reserved_blocks == 25
        swap, *_ = make_swap(SkipJoinMlfq(QuantumLadder(1.0)), device_blocks=100)
        swap.reserve.step(7)
        assert swap.reserved_blocks == 7

    def test_the_planner_tells_it_of_arrivals(self):
        """Prompts that arrive are counted in blocks, once; those that go on are not."""
        stage = SwapStage(num_blocks=100, host_blocks=100)
        for name, prompt in zip("abc", (8, 3, 20), strict=True):
            stage.add(name, prompt=prompt)
        stage.step()
        assert stage.planner.ahead.reserved_blocks == 3 + 1 + 6
        for _ in range(6):
            stage.step()
        assert stage.planner.ahead.reserved_blocks <= 3 + 1 + 6
        stage.add("d", prompt=80)
        stage.step()
        assert stage.planner.ahead.reserved_blocks == 21


def give_back(stage: SwapStage, *, beyond: int, tokens: int) -> None:
    """Nobody grows for ever: who has generated more than that many gives some tokens back."""
    for job in stage.planner.jobs:
        if job.handle.generated > beyond:
            job.handle.generated -= tokens
            job.handle.computed -= tokens


class TestAtOnce:
    """Who has a turn on the host: its KV cache comes in the very step of it, if that is cheaper."""

    def run(self, block_copy_s: float, **options: object) -> tuple[SwapStage, list[str]]:
        """Three jobs of two blocks, room for two of them, steps of a second; the batches.

        Of the first steps none: how often turns come is not known yet.
        """
        ageing = RelativeAgeing(ratio=0.0, gap_s=4.0, limit_s=9.0, most_turns=1)
        stage = SwapStage(
            SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4), ageing=ageing),
            num_blocks=5,
            host_blocks=100,
            copy_steps=1,
            block_copy_s=block_copy_s,
            token_s=100.0,
        )
        for name in "abc":
            stage.add(name, prompt=6)
        batches = []
        for _ in range(200):
            give_back(stage, beyond=1, tokens=1)
            batches.append(stage.step(**options))
            stage.spend(1.0)
        return stage, batches[50:]

    def test_cheap_copies_leave_no_place_empty(self):
        """A quarter of a second for a job's blocks: two run in every step."""
        stage, batches = self.run(block_copy_s=0.125)
        assert all(len(batch.split()) == 2 for batch in batches)
        assert stage.planner.policy.turns > 10
        assert stage.planner.counters.spilled > 10

    def test_dear_copies_are_made_ahead(self):
        """Two seconds for a job's blocks: they are copied beside steps, with one place empty."""
        stage, batches = self.run(block_copy_s=1.0)
        assert any(len(batch.split()) == 1 for batch in batches)
        assert stage.planner.counters.swapped_in > 10

    def test_where_steps_overlap_they_are_made_ahead(self):
        """The blocks of who runs cannot be taken while a step is in flight that writes them."""
        stage, batches = self.run(block_copy_s=0.125, overlapping=True)
        assert any(len(batch.split()) == 1 for batch in batches)
        assert stage.planner.counters.swapped_in > 10

    def test_the_whole_batch_waits_for_it(self):
        """Four who run and wait for half a second lose as much as two places for a step."""
        policy = SkipJoinMlfq(QuantumLadder(1.0), ageing=RelativeAgeing(0.0, 1.0, 9.0, 1))
        device = Device()
        device.copy_s = 0.5
        swap, _, swapped = make_swap(policy, device)
        job = wait(join_at(policy, 0), JobState.SWAPPED)
        swapped.push(job)
        swap.ran(2.0, 1)
        assert list(swap.take_at_once(1)) == [], "it has no turn"
        swapped.discard(job)
        policy.promote_starved(50.0)
        swapped.push(job)
        assert list(swap.take_at_once(4)) == []
        assert len(swapped) == 1
        swap.ran(4.2, 2)
        assert list(swap.take_at_once(4)) == [job]
        assert list(swap.take_at_once(4)) == [], "nobody is there"


class TestGrowth:
    def test_who_comes_back_leaves_room_for_growth(self):
        """Four who run: two blocks of 32 tokens in the next 16 steps; a block each at most."""
        assert StepLimits(8, 512, block_tokens=32).growth(4) == 2
        assert StepLimits(8, 512, block_tokens=16).growth(4) == 4
        assert StepLimits(8, 512, block_tokens=4).growth(4) == 4
        assert StepLimits(8, 512, block_tokens=64, decode_tokens=3).growth(4) == 3

    @pytest.mark.parametrize(("idle_blocks", "comes"), [(2, False), (3, True)])
    def test_it_comes_back_to_what_is_left(self, idle_blocks, comes):
        """A job of two blocks, beside one that runs and grows by one."""
        stage = SwapStage(num_blocks=2 + idle_blocks, host_blocks=10, copy_steps=1, token_s=10.0)
        stage.add("a", prompt=7)
        back = stage.add("b", prompt=7)
        stage.step()
        stage.host.leave(back)
        stage.planner.evict(back, 0.0, spilled=True)
        stage.step()
        assert (back in stage.plan.swapped_in) == comes


class TestStaying:
    """Nobody is sent away for who would be sent away again by the next turn."""

    def swap(self):
        """Somebody on the host who stands before the second of two who run, and no room."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4))
        swap, _, swapped = make_swap(policy)
        first, last = join_at(policy, 0), join_at(policy, 3)
        for job in (first, last):
            wait(job, JobState.RUNNING)
            policy.start(job)
        job = wait(join_at(policy, 1), JobState.SWAPPED)
        swapped.push(job)
        return swap, (first, last), job

    def test_it_is_brought_back_where_no_turns_come(self):
        swap, running, _ = self.swap()
        assert swap.decide(running, Room(0), 1.0).swapped_out == [running[1]]

    def test_it_waits_where_turns_come_often(self):
        """One in 16 steps; once they have stopped for long, it comes back."""
        swap, running, job = self.swap()
        for _ in range(100):
            for turns in (1, *[0] * 15):
                swap._turns.add(turns)
                swap.follow(0, 16)
        assert swap.decide(running, Room(0), 1.0) == SwapDecision()
        idle = Room(swap.demand.new_blocks(job))
        assert swap.decide(running, idle, 1.0).swapped_in == [job], "room that is idle costs nobody"
        swap, running, _ = self.swap()
        swap._turns.per_step = 1 / 16
        swap.ran(0.0, 65)
        assert swap.decide(running, Room(0), 1.0).swapped_out == [running[1]]

    def test_turns_are_counted(self):
        """Those that are taken at once, and those that come back ahead."""
        policy = SkipJoinMlfq(QuantumLadder(1.0), ageing=RelativeAgeing(0.0, 1.0, 9.0, 2))
        swap, _, swapped = make_swap(policy)
        jobs = [wait(join_at(policy, 0), JobState.SWAPPED) for _ in range(2)]
        assert policy.promote_starved(50.0) == jobs
        for job in jobs:
            swapped.push(job)
        swap.ran(1.0, 1)
        assert next(swap.take_at_once(0)) is jobs[0]
        swap.follow(0, 16)
        after_one = swap._turns.per_step
        assert swap.decide((), Room(1000), 50.0).swapped_in == [jobs[1]]
        swap.follow(0, 16)
        assert 0 < after_one < swap._turns.per_step


class TestEventRate:
    def test_it_follows_what_happens(self):
        """One event in four steps; half of it is forgotten in 64 steps without any."""
        rate = EventRate(half_life=64)
        for _ in range(400):
            rate.add()
            for _ in range(4):
                rate.step()
        assert rate.per_step == pytest.approx(0.25, rel=0.05)
        before = rate.per_step
        rate.skip(64)
        assert rate.per_step == pytest.approx(before / 2)

    def test_skipping_is_stepping(self):
        """Steps in which nothing happened, one by one or at once."""
        one, other = EventRate(), EventRate()
        for rate in (one, other):
            rate.add(3)
            rate.step()
        for _ in range(10):
            one.step()
        other.skip(10)
        assert one.per_step == pytest.approx(other.per_step)


class Shuttle:
    """A constant crowd on too small a device, and how often each job goes to the host and back."""

    STEPS = 800

    def __init__(self, seed: int, ageing: Ageing | None) -> None:
        dice = random.Random(seed)
        self.levels, copy_steps = dice.randint(3, 8), dice.randint(1, 4)
        self.policy = SkipJoinMlfq(
            QuantumLadder(1.0, 2.0, self.levels),
            ageing=ageing,
            service_weight=dice.choice([0.0, 100.0]),
        )
        # Ten to forty blocks are copied in the steps that a copy takes; a step is a second.
        copy_s = copy_steps / dice.choice([10, 20, 40])
        self.stage = SwapStage(
            self.policy,
            num_blocks=100,
            host_blocks=1 << 20,
            copy_steps=copy_steps,
            block_copy_s=copy_s,
            token_s=100.0,
        )
        for number in range(dice.randint(10, 20)):
            self.stage.add(f"{number}", prompt=dice.randint(4, 80))
        self.batch_limit = dice.randint(2, 6)
        self.outs: Counter[Job] = Counter()
        self.idle: set[Job] = set()
        self.in_vain = 0
        for _ in range(self.STEPS):
            self.step()

    def step(self) -> None:
        give_back(self.stage, beyond=8, tokens=4)
        self.stage.step(batch_limit=self.batch_limit)
        self.stage.spend(1.0)
        plan = self.stage.plan
        self.idle -= set(plan.batch)
        for job in (*plan.swapped_out, *plan.spilled, *plan.recomputed):
            self.in_vain += job in self.idle
            self.outs[job] += 1
        self.idle |= {*plan.swapped_out, *plan.spilled, *plan.recomputed}


class TestNoPingPong:
    @pytest.mark.parametrize("seed", range(6))
    def test_a_job_runs_between_two_exits(self, seed):
        """Without promotion, nobody leaves a second time for having come back only."""
        shuttle = Shuttle(seed, None)
        assert shuttle.in_vain == 0
        assert max(shuttle.outs.values()) <= 2 * shuttle.levels

    def test_a_promoted_job_runs_between_two_exits(self):
        """Nor where starvation prevention moves jobs up."""
        assert not any(Shuttle(seed, AbsoluteAgeing(20.0)).in_vain for seed in (2, 7, 14))

    @pytest.mark.parametrize("ratio", [0.0, 10.0])
    def test_a_job_with_a_turn_runs_between_two_exits(self, ratio):
        """Nor where it comes back for a turn."""
        ageing = RelativeAgeing(ratio, gap_s=8.0, limit_s=60.0, most_turns=2)
        assert not any(Shuttle(seed, ageing).in_vain for seed in range(6))

    @pytest.mark.parametrize(
        "ageing",
        [
            *[AbsoluteAgeing(limit_s) for limit_s in (20.0, 100.0)],
            *[RelativeAgeing(r, gap_s=8.0, limit_s=60.0, most_turns=2) for r in (0.0, 10.0)],
        ],
    )
    def test_exits_are_bounded_by_turns(self, ageing):
        """There are as many as somebody's turns call for: of levels passed, and of ageing."""
        for seed in range(4):
            shuttle = Shuttle(seed, ageing)
            policy = shuttle.policy
            turns = shuttle.levels * len(shuttle.stage.jobs) + policy.promotions + policy.turns
            assert 0 < sum(shuttle.outs.values()) <= 1.5 * turns


@pytest.mark.parametrize(
    ("policy", "first", "gone"), [(Fcfs(), "a b", "d"), (FixedPriority(), "b c", "a")]
)
def test_static_policies_send_away_the_last_of_their_order(policy, first, gone):
    """Where one comes back that stands before it, whoever arrived last, or is the longest, goes."""
    stage = SwapStage(policy, num_blocks=30, host_blocks=100)
    for name, prompt in zip("abcd", (28, 8, 12, 16), strict=True):
        stage.add(name, prompt=prompt)
    stage.step(batch_limit=4)
    assert stage.step(batch_limit=2) == first
    back = stage.jobs[first[0]]
    stage.host.leave(back)
    stage.planner.evict(back, stage.now_s, spilled=True)
    stage.add("z", prompt=52, priority=-1, output=2)
    moved = []
    for _ in range(4):
        stage.step(batch_limit=2)
        moved += [*stage.plan.swapped_out, *stage.plan.spilled]
    assert moved[0] is stage.jobs[gone]


def test_who_comes_back_needs_a_slot():
    """Where pausing keeps a slot, nobody comes back to a device that has none left."""
    stage = SwapStage(num_blocks=100, host_blocks=100, slots=2)
    for name in "abc":
        stage.add(name, prompt=4)
    stage.step(batch_limit=2)
    stage.host.leave(stage.jobs["a"])
    stage.planner.evict(stage.jobs["a"], stage.now_s, spilled=True)
    stage.add("z", prompt=4, priority=-1)
    for _ in range(4):
        stage.step(batch_limit=2)
        assert stage.planner.roster.num_residents <= 2
