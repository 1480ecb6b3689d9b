"""Levels, quanta, demotion, promotion, and the policies that have none of them."""

import math
from statistics import mean
from typing import ClassVar

import pytest
from fake_host import Stage, make_job

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.base import Fcfs, FixedPriority
from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.make import make_ladder, make_policy
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.policy.quantum import QuantumLadder


class TestLadder:
    def test_each_quantum_is_a_ratio_times_the_one_above(self):
        """Quanta grow by the ratio, and the last level has none."""
        assert QuantumLadder(0.5, 3.0, 4).quanta_s == (0.5, 1.5, 4.5, math.inf)

    @pytest.mark.parametrize(
        ("first_step_s", "level"),
        [
            *[(0.0, 0), (1e-9, 0), (1.0, 0), (1.001, 1), (2.0, 1), (2.001, 2), (4.0, 2)],
            *[(4.001, 3), (1e9, 3), (math.inf, 3)],
        ],
    )
    def test_a_job_joins_the_first_level_whose_quantum_holds_its_first_step(
        self, first_step_s, level
    ):
        """The join level is the highest whose quantum is at least the first step."""
        assert QuantumLadder(1.0, 2.0, 4).join_level(first_step_s) == level

    def test_rounding_does_not_push_a_job_down(self):
        """A first step of exactly a quantum fits, however it was added up."""
        assert 0.1 + 0.1 + 0.1 > 0.3
        assert QuantumLadder(0.3, 2.0, 4).join_level(0.1 + 0.1 + 0.1) == 0

    @pytest.mark.parametrize("levels", [1, 2, 64])
    def test_the_last_level_takes_everything(self, levels):
        """Any prompt has a level."""
        assert QuantumLadder(1.0, 2.0, levels).join_level(1e300) == levels - 1

    def test_a_steep_ladder_has_endless_levels_instead_of_an_overflow(self):
        """Quanta beyond what a float holds are endless."""
        assert QuantumLadder(1.0, 1e200, 4).quanta_s == (1.0, 1e200, math.inf, math.inf)

    @pytest.mark.parametrize(
        "arguments",
        [
            *[(0.0,), (-1.0,), (math.nan,), (math.inf,)],
            *[(1.0, 1.0), (1.0, 0.5), (1.0, math.nan), (1.0, math.inf), (1.0, 2.0, 0)],
        ],
    )
    def test_a_ladder_that_cannot_be_climbed_is_refused(self, arguments):
        """A bad base, ratio or number of levels raises, naming it."""
        with pytest.raises(ValueError, match=r"^(base_s|ratio|num_levels) must be"):
            QuantumLadder(*arguments)


def running_job(policy: SkipJoinMlfq, first_step_s: float = 0.0) -> Job:
    """A job that has joined and runs."""
    stage = Stage(policy)
    job = make_job("a", output=1 << 20)
    job.first_step_s = first_step_s
    stage.planner.add(job, now_s=0.0)
    stage.step()
    return job


def charge(policy: SkipJoinMlfq, job: Job, *steps_s: float) -> list[int]:
    """The job's level after each step."""
    levels = []
    for step_s in steps_s:
        policy.charge(step_s)
        levels.append(job.level)
    return levels


class TestLevels:
    def test_a_used_up_quantum_costs_one_level(self):
        """A job moves down when its quantum is used up, not before."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4))
        job = running_job(policy)
        assert charge(policy, job, 0.5, 0.5, 1.0, 0.5, 0.5) == [0, 1, 1, 1, 2]

    def test_a_long_step_costs_one_level(self):
        """However long a step is, it costs one level, and the next starts from nothing."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 5))
        job = running_job(policy)
        assert charge(policy, job, 100.0, 1.0, 1.0, 4.0) == [1, 1, 2, 3]

    def test_the_last_level_is_endless(self):
        """There is nothing below the last level."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 2))
        job = running_job(policy)
        assert charge(policy, job, 1.0, 1e9, 1e9) == [1, 1, 1]

    def test_a_quantum_too_short_to_measure_ends_with_its_step(self):
        """A quantum that vanishes in the service clock's rounding does not stop the clock."""
        policy = SkipJoinMlfq(QuantumLadder(1e-300, 2.0, 4), steady_levels=1)
        job = running_job(policy)
        assert charge(policy, job, 1.0, 1.0) == [0, 0]

    def test_service_counts_over_interruptions(self):
        """What a job attained before it was paused counts when it runs again."""
        stage = Stage(SkipJoinMlfq(QuantumLadder(1.0, 2.0, 3)))
        stage.add("a")
        stage.step()
        stage.spend(0.75)
        stage.add("z", priority=-1, output=2)
        stage.step(batch_limit=1)
        stage.spend(0.75)
        assert (stage.step(batch_limit=1), stage.jobs["a"].level) == ("z", 0)
        assert stage.step(batch_limit=1) == "a"
        stage.spend(0.25)
        assert (stage.step(batch_limit=1), stage.jobs["a"].level) == ("a", 1)

    def test_the_levels_below_the_steady_ones_open_under_pressure(self):
        """With few waiting, a quantum in the lowest steady level is renewed."""
        stage = Stage(SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4), steady_levels=2, pressure_jobs=2))
        for name in "abc":
            stage.add(name)
        for _ in range(4):
            stage.step(batch_limit=1)
            stage.spend(2.0)
        stage.planner.observe(2.0, stage.now_s)
        levels = [job.level for job in stage.jobs.values()]
        assert max(levels) == 1
        stage.add("d")
        for _ in range(4):
            stage.step(batch_limit=1)
            stage.spend(2.0)
        assert max(job.level for job in stage.jobs.values()) == 2

    def test_a_renewed_quantum_is_a_whole_one(self):
        """Where the level below is closed, service before an interruption is not counted again."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 3), steady_levels=1, pressure_jobs=9)
        job = running_job(policy)
        charge(policy, job, 0.75)
        policy.stop(job, now_s=0.0)
        policy.start(job)
        charge(policy, job, 0.5)
        policy.pressure_jobs = -1
        assert charge(policy, job, 0.5, 0.25, 0.25) == [0, 0, 1]

    def test_the_steady_levels_end_in_arrival_order(self):
        """From the lowest steady level down, jobs run in the order of their arrival."""
        ladder = QuantumLadder(1.0, 2.0, 4)
        stage = Stage(SkipJoinMlfq(ladder, steady_levels=2, pressure_jobs=5))
        for name in "ab":
            stage.add(name)
        order = []
        for _ in range(6):
            order.append(stage.step(batch_limit=1))
            stage.spend(1.0)
        assert order == ["a", "b", "a", "a", "a", "a"]

    def test_a_shorter_ladder_counts_what_was_attained(self):
        """After a re-base, a job that has had the new quantum moves down with its next step."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4))
        job = running_job(policy)
        assert charge(policy, job, 0.75) == [0]
        policy.set_ladder(QuantumLadder(0.5, 2.0, 4), [job])
        assert charge(policy, job, 0.001, 0.5, 0.5) == [1, 1, 2]

    def test_a_ladder_of_another_height_is_refused(self):
        """The number of levels does not change."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4))
        with pytest.raises(ValueError, match="has 4 levels, got 5"):
            policy.set_ladder(QuantumLadder(1.0, 2.0, 5), [])

    def test_counters_and_level_sizes_follow(self):
        """Demotions, skip-joins and the sizes of the levels are counted."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 4))
        job = running_job(policy, first_step_s=1.5)
        charge(policy, job, 2.0)
        assert (policy.skip_joins, policy.demotions, policy.promotions) == (1, 1, 0)
        assert policy.level_sizes == [0, 0, 1, 0]


class TestPromotion:
    def starving(self, **options) -> Stage:
        """Three jobs on one place; each was demoted, the first runs."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 6), starvation_limit_s=10.0, **options)
        stage = Stage(policy)
        for name in "abc":
            stage.add(name)
        for _ in range(3):
            stage.step(batch_limit=1)
            stage.spend(1.0)
        stage.step(batch_limit=1)
        return stage

    def levels(self, stage: Stage) -> list[int]:
        return [job.level for job in stage.jobs.values()]

    def test_a_job_is_promoted_at_the_limit_not_before(self):
        """Waiting for the starvation limit leads to level 0."""
        stage = self.starving()
        assert self.levels(stage) == [1, 1, 1]
        limit_s = stage.jobs["b"].waiting_since_s + 10.0
        stage.planner.observe(0.0, limit_s - 1e-6)
        assert self.levels(stage) == [1, 1, 1]
        stage.planner.observe(0.0, limit_s)
        assert self.levels(stage) == [1, 0, 1]

    def test_the_promoted_run_next(self):
        """A promoted job is ahead of the demoted ones."""
        stage = self.starving()
        stage.planner.observe(0.0, 100.0)
        assert stage.step(batch_limit=2) == "b c"

    def test_promotions_can_be_limited(self):
        """At most so many are promoted at a time, longest wait first."""
        stage = self.starving(max_promotions=1)
        stage.planner.observe(0.0, 100.0)
        assert self.levels(stage) == [1, 0, 1]
        stage.planner.observe(0.0, 100.0)
        assert self.levels(stage) == [1, 0, 0]

    def test_a_running_job_does_not_starve(self):
        """Time in the batch is not waiting."""
        stage = self.starving()
        stage.planner.observe(0.0, 1e9)
        assert stage.jobs["a"].level == 1

    def test_promotion_stays_within_the_priority_class(self):
        """A starving job of a lower class does not pass a higher one."""
        stage = self.starving()
        stage.add("z", priority=-1)
        stage.planner.observe(0.0, 100.0)
        assert stage.step(batch_limit=1) == "z"

    def test_without_a_limit_nobody_is_promoted(self):
        """None switches promotion off."""
        stage = self.starving()
        stage.planner.policy.starvation_limit_s = None
        stage.planner.observe(0.0, 1e9)
        assert self.levels(stage) == [1, 1, 1]


class TestWorkedExample:
    """Three jobs that arrive together in this order; a batch of one; iterations are whole.

    | job | prefill | decodes of 1 s | service |
    |-----|---------|----------------|---------|
    | a   | 3 s     | 1              | 4 s     |
    | b   | 1 s     | 2              | 3 s     |
    | c   | 1 s     | 1              | 2 s     |

    Quanta 1, 2, 4 ... seconds. By hand:

    FCFS: a until 4, b until 7, c until 9.
    Naive MLFQ: at level 0, a has its prefill until 3, b until 4, c until 5; at level 1, a has its
    decode until 6, b its two until 8, c until 9.
    Skip-join: a joins level 2. At level 0, b until 1, c until 2; at level 1, b until 4, c until 5;
    at level 2, a until 9 (its prefill and its decode are 4 s, the quantum of level 2).
    """

    PREFILL_S: ClassVar = {"a": 3.0, "b": 1.0, "c": 1.0}
    OUTPUT: ClassVar = {"a": 2, "b": 3, "c": 2}

    def finish_times(self, policy) -> list[float]:
        stage = Stage(policy)
        started = set()
        for name, prefill_s in self.PREFILL_S.items():
            job = make_job(name, prompt=int(prefill_s), output=self.OUTPUT[name])
            job.first_step_s = prefill_s
            stage.jobs[name] = job
            stage.planner.add(job, now_s=0.0)
        while len(stage.planner):
            name = stage.step(batch_limit=1)
            stage.spend(1.0 if name in started else self.PREFILL_S[name])
            started.add(name)
            for finished in stage.finished_at_s.keys() & {name}:
                stage.finished_at_s[finished] = stage.now_s
        return [stage.finished_at_s[name] for name in "abc"]

    @pytest.mark.parametrize(
        ("policy", "finish_s", "mean_s"),
        [
            ("fcfs", [4.0, 7.0, 9.0], 20 / 3),
            ("mlfq", [6.0, 8.0, 9.0], 23 / 3),
            ("fastserve", [9.0, 4.0, 5.0], 18 / 3),
        ],
    )
    def test_the_example_runs_as_computed_by_hand(self, policy, finish_s, mean_s):
        """Skip-join beats arrival order, which beats the naive queues."""
        config = FastServeConfig(policy=policy, base_quantum_s=1.0, starvation_limit_s=None)
        finished = self.finish_times(make_policy(config, base_s=9.0, batch_limit=1))
        assert finished == finish_s
        assert mean(finished) == pytest.approx(mean_s)


class TestOtherPolicies:
    @pytest.mark.parametrize(
        ("policy", "order"), [(Fcfs(), "z a b c d"), (FixedPriority(), "z b d c a")]
    )
    def test_a_static_policy_never_changes_its_order(self, policy, order):
        """Arrival order, or shortest prompt first; the priority class comes first in both."""
        stage = Stage(policy)
        for name, prompt in zip("abcd", [9, 3, 5, 3], strict=True):
            stage.add(name, prompt=prompt)
        stage.add("z", prompt=12, priority=-1)
        for _ in range(3):
            assert stage.step() == order
            stage.spend(100.0)
        assert policy.num_levels == 1

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("fcfs", Fcfs),
            ("fixed-priority", FixedPriority),
            ("mlfq", SkipJoinMlfq),
            ("fastserve", SkipJoinMlfq),
        ],
    )
    def test_make_policy_builds_what_the_configuration_names(self, name, kind):
        """Every policy name has its policy; only `fastserve` skips levels."""
        policy = make_policy(FastServeConfig(policy=name), base_s=1.0, batch_limit=16)
        assert type(policy) is kind
        assert getattr(policy, "skip_join", False) == (name == "fastserve")

    def test_make_policy_hands_the_configuration_on(self):
        """Levels, quanta and limits reach the policy."""
        config = FastServeConfig(
            quantum_ratio=3.0, num_levels=5, steady_levels=4, starvation_limit_s=7.0
        )
        policy = make_policy(config, base_s=0.25, batch_limit=256)
        assert policy.ladder == QuantumLadder(0.25, 3.0, 5)
        assert (policy.starvation_limit_s, policy.arrival_level) == (7.0, 3)
        assert policy.pressure_jobs >= 256
        assert 1 <= policy.max_promotions <= 256

    def test_a_configured_base_quantum_wins(self):
        """The configured base is used instead of the measured one."""
        assert make_ladder(FastServeConfig(base_quantum_s=0.5), base_s=0.25).base_s == 0.5
        assert make_ladder(FastServeConfig(), base_s=0.25).base_s == 0.25
