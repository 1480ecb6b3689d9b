"""Levels, quanta, demotion, promotion, and the policies that have none of them."""

import math
from statistics import mean
from typing import ClassVar

import pytest
from fake_host import Stage, make_job

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.policy.ageing import AbsoluteAgeing, Ageing, RelativeAgeing
from fastserve_vllm.policy.base import Fcfs, FixedPriority
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.lengths import AnswerLengths
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


def running_job(policy: SkipJoinMlfq, first_step_s: float = 0.0, prompt: int = 1) -> Job:
    """A job that has joined and runs."""
    stage = Stage(policy)
    job = make_job("a", prompt, output=1 << 20, first_step_s=first_step_s)
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
        policy = SkipJoinMlfq(QuantumLadder(1e-300, 2.0, 4))
        job = running_job(policy)
        assert charge(policy, job, 1.0, 1.0, 1.0, 1.0) == [1, 2, 3, 3]

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

    def test_the_last_level_is_served_by_age(self):
        """Without a weight, the last level runs in the order of arrival, whoever came down last."""
        stage = Stage(SkipJoinMlfq(QuantumLadder(1.0, 2.0, 2)))
        stage.add("a").first_step_s = 9.0
        order = []
        for name in "bc  ":
            if name != " ":
                stage.add(name)
            order.append(stage.step(batch_limit=1))
            stage.spend(1.0)
        order += [stage.step(batch_limit=1) for _ in range(2)]
        assert order == ["a", "b", "c", "a", "a", "a"]

    def test_service_makes_older_in_the_last_level(self):
        """A second of service is worth as many seconds of age as the weight says."""
        times = {}
        for weight in (0.0, 1.0, 3.0):
            policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 2), service_weight=weight)
            stage = Stage(policy)
            stage.add("a")
            stage.step()
            stage.spend(1.0)
            stage.add("z", priority=-1, output=8)
            for _ in range(7):
                stage.step(batch_limit=1)
            stage.spend(1.0)
            young = stage.add("b")
            stage.step(batch_limit=1)
            policy.start(young)
            policy.charge(3.0)
            policy.stop(young, 5.0)
            times[weight] = (stage.jobs["a"].key, young.key)
        assert [young < old for old, young in times.values()] == [False, False, True]

    def test_service_counts_while_it_is_attained(self):
        """Who runs in the last level is not displaced by whom it has outrun meanwhile.

        a enters the last level at 1 s, at place 0 - 3 * 1. Until 18 s it has gained 17 * 3 more.
        b comes at 8 s and enters at 18, at place 8 - 3 * 10: between a's old one and its new one.
        """
        stage = Stage(SkipJoinMlfq(QuantumLadder(1.0, 2.0, 2), service_weight=3.0))
        stage.add("a")
        for _ in range(8):
            stage.step()
            stage.spend(1.0)
        job = make_job("b", output=1 << 20)
        job.first_step_s = 10.0
        stage.planner.add(job, stage.now_s)
        for _ in range(10):
            assert stage.step(batch_limit=2) == "b a"
            stage.spend(1.0)
        assert [stage.step(batch_limit=1) for _ in range(3)] == ["a"] * 3
        assert job.key == (0, 1, 8 - 3.0 * 10, job.arrival)
        assert stage.planner.policy.key_among_waiting(stage.jobs["a"])[2] == 0 - 3.0 * 18

    def test_who_is_expected_to_be_done_first_is_first(self):
        """As of entering the last level: by its prompt, from the answers that ended before.

        An answer is two quanta long for a prompt of 2 tokens, ten for one of 64. Without a weight,
        arrival alone counts.
        """
        orders = {}
        for weight in (0.0, 8.0):
            policy = SkipJoinMlfq(
                QuantumLadder(1.0, 2.0, 2), service_weight=weight, lengths=AnswerLengths()
            )
            for _ in range(20):
                for prompt, service_s in ((2, 2.0), (64, 10.0)):
                    charge(policy, ended := running_job(policy, prompt=prompt), service_s)
                    policy.leave(ended)
            stage = Stage(policy)
            stage.add("long", prompt=64)
            stage.add("short", prompt=2)
            for _ in range(3):
                stage.step()
                stage.spend(1.0)
            orders[weight] = [stage.step(batch_limit=1), stage.jobs["short"].longer_s < 0]
        assert orders == {0.0: ["long", True], 8.0: ["short", True]}

    def test_a_prompt_joins_above_the_last_level(self):
        """However long it takes, and it is not demoted before its first token."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 3))
        job = running_job(policy, first_step_s=10.0)
        assert charge(policy, job, 3.0, 3.0, 3.5, 0.5) == [1, 1, 1, 2]

    def test_grace_is_given_once(self):
        """In the level that a prompt joins; the same level's quantum is an ordinary one later."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 3), ageing=AbsoluteAgeing(5.0))
        job = running_job(policy, first_step_s=10.0)
        charge(policy, job, 10.0)
        policy.stop(job, now_s=0.0)
        job.state = JobState.PAUSED
        assert policy.promote_starved(5.0) == [job]
        policy.start(job)
        job.state = JobState.RUNNING
        assert charge(policy, job, 1.0, 2.0) == [1, 2]

    def test_no_grace_without_skip_join(self):
        """The naive queues demote a prompt that takes longer than the first quantum."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 3), skip_join=False)
        job = running_job(policy, first_step_s=10.0)
        assert charge(policy, job, 1.0, 2.0) == [1, 2]

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
    PAPER: ClassVar = AbsoluteAgeing(10.0)

    def starving(self, ageing: Ageing | None = PAPER) -> Stage:
        """Three jobs on one place; each was demoted, the first runs."""
        policy = SkipJoinMlfq(QuantumLadder(1.0, 2.0, 6), ageing=ageing)
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

    def test_without_ageing_nobody_is_promoted(self):
        """None switches it off."""
        stage = self.starving(None)
        stage.planner.observe(0.0, 1e9)
        assert self.levels(stage) == [1, 1, 1]
        assert stage.step(batch_limit=2) == "a b"


class TestTurns:
    """Relative ageing; steps of a second, one place."""

    def stage(self, **options: float) -> Stage:
        """`a` and `b` came down to level 1; from now on new jobs of a step each take the place.

        b waits since 2 s, a since 3 s.
        """
        options = {"ratio": 3.0, "gap_s": 6.0, "limit_s": 20.0, "most_turns": 1} | options
        stage = Stage(SkipJoinMlfq(QuantumLadder(1.0, 2.0, 6), ageing=RelativeAgeing(**options)))
        stage.add("a")
        stage.add("b")
        assert self.run(stage, 3, crowded=False) == "aba"
        return stage

    def run(self, stage: Stage, steps: int, *, crowded: bool = True) -> str:
        """Who runs in each step; `.` for one of the new jobs."""
        ran = ""
        for _ in range(steps):
            if crowded and "." not in {job.job_id for job in stage.planner.jobs}:
                stage.add(".", output=1)
            ran += stage.step(batch_limit=1)
            stage.spend(1.0)
        return ran

    def test_a_turn_is_a_step(self):
        """Who has waited for the gap bound runs for a step, and then waits for it again.

        b is due at 8 s and runs until 9, so again at 15; a at 9 s and at 16.
        """
        assert self.run(self.stage(), 20) == ".....ba.....ba.....b"

    def test_a_turn_changes_no_level(self):
        """But for the service that it is: a quantum may be used up by it."""
        stage = self.stage()
        levels = []
        for _ in range(16):
            self.run(stage, 1)
            levels.append((stage.jobs["a"].level, stage.jobs["b"].level))
        stage.planner.observe(stage.now_s, stage.now_s)
        policy = stage.planner.policy
        assert (policy.turns, policy.promotions) == (4, 0)
        assert levels[0] == (1, 1)
        # a had 1 s of its 2 s before, b nothing.
        assert levels[7:13] == [(2, 1)] * 6

    def test_a_job_returns_to_its_place(self):
        """After its turn, it stands where it would stand without."""
        stage = self.stage(gap_s=4.0)
        places = {name: stage.jobs[name].entry for name in "ab"}
        before = stage.jobs["b"].key
        self.run(stage, 3)
        stage.planner.observe(0.0, stage.now_s)
        assert stage.jobs["b"].key < (0, 0)
        assert self.run(stage, 1) == "b"
        self.run(stage, 1)
        assert stage.jobs["b"].key == before
        assert stage.jobs["b"].entry == places["b"]

    def test_turns_are_limited(self):
        """At most so many have a turn at a time, and who is longest overdue is first."""
        stage = self.stage(most_turns=1)
        self.run(stage, 1)
        stage.planner.observe(0.0, 100.0)
        assert [stage.jobs[name].turn_s is None for name in "ab"] == [True, False]
        stage = self.stage(most_turns=2)
        self.run(stage, 1)
        stage.planner.observe(0.0, 100.0)
        assert [stage.jobs[name].turn_s is None for name in "ab"] == [False, False]
        assert self.run(stage, 3) == "ba."

    def test_a_late_turn_is_counted(self):
        """One that came later than another gap after it was due."""
        stage = self.stage()
        policy = stage.planner.policy
        assert policy.overdue_s(7.0) == 0.0
        assert policy.overdue_s(20.0) == 12.0
        stage.planner.observe(0.0, 13.0)
        assert (policy.turns, policy.late_turns) == (1, 0)
        stage = self.stage()
        stage.planner.observe(0.0, 14.5)
        assert stage.planner.policy.late_turns == 1

    def test_a_turn_without_kv_cache_lasts_until_the_first_token(self):
        """The time that it is said to take, and until a step leaves as much to do as was before."""
        stage = self.stage(ratio=0.0, gap_s=2.0)
        self.run(stage, 1)
        job = stage.jobs["b"]
        stage.host.drop(job)
        stage.planner.evict(job, stage.now_s)
        job.first_step_s = 2.0
        stage.now_s = 22.5
        # a is longest overdue. Then the new job is, since 24.5 s, and a again since 25.5.
        assert self.run(stage, 6) == "abbb.a"

    def test_a_turn_stays_with_the_urgent_class_behind(self):
        """A turn raises nobody above a more urgent class; it is kept until it has been had."""
        stage = self.stage()
        stage.add("z", priority=-1, output=20)
        assert self.run(stage, 21) == "z" * 20 + "b"

    def test_turns_of_a_class_that_cannot_run_are_no_turns_of_another(self):
        """Who waits in the more urgent class gets its turns, whoever has one below."""
        stage = self.stage()
        stage.add("z", priority=1)
        assert self.run(stage, 20) == ".....ba.....ba.....b"
        assert stage.jobs["z"].turn_s is not None

    def test_the_gap_bound_follows_slow_steps(self):
        """It is so many base quanta where that is longer; nothing is longer than the limit."""
        ageing = RelativeAgeing(0.0, gap_s=0.5, limit_s=8.0, most_turns=1, gap_quanta=4.0)
        ladder = QuantumLadder(0.1, 2.0, 3)
        policy = SkipJoinMlfq(ladder, ageing=ageing)
        gaps = []
        for base_s in (0.1, 1.0, 3.0):
            policy.set_ladder(QuantumLadder(base_s, 2.0, 3), [])
            gaps.append(policy.gap_s)
        assert gaps == [0.5, 4.0, 8.0]
        assert SkipJoinMlfq(ladder, ageing=AbsoluteAgeing(1.0)).gap_s == math.inf


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
        config = FastServeConfig(
            policy=policy, objective="paper", base_quantum_s=1.0, starvation_limit_s="off"
        )
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

    def test_a_configured_base_quantum_wins(self):
        """The configured base is used instead of the measured one."""
        assert make_ladder(FastServeConfig(base_quantum_s=0.5), base_s=0.25).base_s == 0.5
        assert make_ladder(FastServeConfig(), base_s=0.25).base_s == 0.25
