"""Invariants I1, I2, I3 and I9 of the planner and the policy, whatever happens to them."""

import random
from collections import Counter

import pytest
from fake_host import TICK_S, blocks_for, make_job, queued_jobs
from fake_swap import MODES, MOVING, SwapHost, make_planner
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import CheckedMlfq, ReferencePlan, called_up, reference_plan

from fastserve_vllm.policy.ageing import AbsoluteAgeing, Ageing, RelativeAgeing
from fastserve_vllm.policy.budget import StepLimits, Verdict
from fastserve_vllm.policy.first_tokens import FirstTokenShare
from fastserve_vllm.policy.job import Job, JobState
from fastserve_vllm.policy.lengths import AnswerLengths
from fastserve_vllm.policy.quantum import QuantumLadder
from fastserve_vllm.policy.step_plan import StepPlan

RESIDENT = (JobState.RUNNING, JobState.PAUSED)
ticks = st.integers(1, 64)
seeds = st.integers(0, 1 << 16)
picks = seeds.map(random.Random)


@st.composite
def step_options(draw) -> dict[str, object]:
    """Limits of a step that do not come from the device."""
    return {
        "batch_limit": draw(st.integers(0, 6)),
        "token_budget": draw(st.sampled_from([1, 3, 8, 24, 512])),
        "prefill_chunk": draw(st.sampled_from([1 << 62, 5])),
        "chunked_prefill": draw(st.booleans()),
        "max_adapters": draw(st.sampled_from([None, None, 1, 2])),
        "overlapping": draw(st.booleans()),
        "admit_queued": draw(st.integers(0, 5)) > 0,
    }


def random_ageing(dice: random.Random) -> Ageing | None:
    """No ageing, the absolute rule, or the relative one with any figures; all times are exact."""
    limit_s = dice.choice([16, 64, 256]) * TICK_S
    relative = RelativeAgeing(
        ratio=dice.choice([0.0, 1.0, 4.0]),
        gap_s=dice.choice([1, 8, 32]) * TICK_S,
        limit_s=limit_s,
        most_turns=dice.randint(1, 3),
        gap_quanta=dice.choice([0.0, 2.0]),
    )
    return dice.choice([None, AbsoluteAgeing(limit_s), relative, relative])


@st.composite
def ageings(draw) -> Ageing | None:
    """Any ageing."""
    return random_ageing(random.Random(draw(seeds)))


class PolicyMachine(RuleBasedStateMachine):
    """Everything that can happen to a job, in any order, on a device of any size."""

    @initialize(
        base=st.integers(1, 8),
        levels=st.integers(1, 5),
        ageing=ageings(),
        weight=st.sampled_from([0.0, 1.0, 8.0]),
        learns=st.booleans(),
        share=st.sampled_from([None, 0.25, 0.5]),
        skip_join=st.booleans(),
        blocks=st.integers(18, 60),
        slots=st.sampled_from([None, 1, 3, 8]),
        headroom=st.integers(0, 2),
        mode=st.sampled_from(MODES),
        host=st.fixed_dictionaries(
            {
                "host_blocks": st.sampled_from([0, 3, 12, 40, 1000]),
                "copy_steps": st.integers(0, 4),
                "block_copy_s": st.sampled_from([0.0, TICK_S / 4, 4 * TICK_S]),
                "token_s": st.sampled_from([0.0, TICK_S / 4, 4 * TICK_S]),
            }
        ),
    )
    def build(
        self,
        base,
        levels,
        ageing,
        weight,
        learns,
        share,
        skip_join,
        blocks,
        slots,
        headroom,
        mode,
        host,
    ):
        self.policy = CheckedMlfq(
            QuantumLadder(base * TICK_S, 2.0, levels),
            skip_join=skip_join,
            ageing=ageing,
            service_weight=weight,
            lengths=AnswerLengths() if learns else None,
            first_tokens=FirstTokenShare(share) if share else None,
        )
        self.mode = mode
        self.host = SwapHost(blocks, slots, headroom, **host)
        self.planner = make_planner(self.policy, self.host, mode)
        self.now_s = self.unobserved_s = self.step_s = 0.0
        self.arrived = self.left = 0

    # ---- what can happen ------------------------------------------------------------------

    @rule(
        prompt=st.integers(1, 40),
        output=st.integers(1, 12),
        priority=st.integers(-1, 1),
        adapter=st.integers(0, 3),
        cached=st.integers(0, 39),
        blocked=st.booleans(),
    )
    def arrive(self, prompt, output, priority, adapter, cached, blocked):
        cached = min(cached, prompt - 1) if cached % 2 else 0
        job = make_job(
            f"job-{self.arrived}",
            prompt,
            output,
            priority=priority,
            adapter=adapter,
            cached=cached,
        )
        self.arrived += 1
        if blocked:
            self.planner.add_blocked(job)
        else:
            self.planner.add(job, self.now_s)

    @rule(seed=seeds, number=st.integers(2, 8))
    def crowd(self, seed, number):
        dice = random.Random(seed)
        longest = dice.choice([4, 40])
        for _ in range(number):
            self.arrive(
                prompt=dice.randint(1, longest),
                output=dice.randint(1, 30),
                priority=dice.choice([-1, 0, 0, 0, 0, 1]),
                adapter=dice.randint(0, 3),
                cached=dice.randint(0, 39),
                blocked=False,
            )

    @rule(seed=seeds, number=st.integers(2, 12), length=ticks)
    def steps(self, seed, number, length):
        """Steps with room for tokens; memory is what binds."""
        dice = random.Random(seed)
        options = {"batch_limit": dice.randint(2, 6), "token_budget": dice.choice([16, 64])}
        for _ in range(number):
            self.run_step(options, length if dice.random() < 0.8 else 4 * length)

    @rule(options=step_options(), length=ticks, misses=st.booleans(), pick=picks)
    def step(self, options, length, misses, pick):
        """A step; now and then the host does not run a job of the batch."""
        chance = 0.3 if misses else 0.0
        self.run_step(options, length, lambda job: pick.random() < chance)

    def run_step(self, options, length, misses=lambda job: False):
        """The whole life of a step: observe, plan, apply, run."""
        self.observe()
        plan, limits, states = self.plan(options)
        entering = self.host.returned
        resident = [j for j in plan.batch if states[j] in RESIDENT and j not in entering]
        missed = [job for job in plan.batch if misses(job)]
        self.host.move(plan, self.planner, self.now_s)
        for job in self.host.run(plan, self.planner, limits, resident, missed):
            self.remove(job)
        missed = [job for job in missed if job not in self.host.refused]
        for number, job in enumerate(missed):
            self.miss(job, resident=job in resident, blocked=number % 4 == 3)
        self.host.step_copies(self.planner, self.now_s)
        self.now_s += length * TICK_S
        self.unobserved_s += length * TICK_S

    def miss(self, job, *, resident, blocked):
        """Tell the planner of a job that the host did not run."""
        if resident:
            self.planner.missed(job, self.now_s)
        elif blocked:
            self.planner.block(job)
        else:
            self.planner.evict(job, self.now_s)

    @rule(pick=picks)
    def abort(self, pick):
        self.remove_some(pick, *JobState)

    @rule(pick=picks, spills=st.booleans())
    def host_preempts(self, pick, spills=True):
        """The host gives up KV cache by itself, or loses what is on its way."""
        if job := self.some(pick, *RESIDENT, *MOVING, JobState.SWAPPED):
            spills = spills and job.state in RESIDENT and self.mode != "recompute"
            if spills and self.host.has_host_room(job):
                self.host.leave(job)
            else:
                spills = False
                self.host.drop(job)
            self.planner.evict(job, self.now_s, spilled=spills)

    @precondition(lambda self: self.host.copies)
    @rule(pick=picks)
    def copy_fails(self, pick):
        pick.choice(self.host.copies).fails = True

    @rule(pick=picks)
    def block(self, pick):
        if job := self.some(pick, *JobState):
            self.planner.block(job)
            self.host.drop(job)

    @rule(pick=picks, loaded=st.booleans())
    def unblock(self, pick, loaded):
        """A blocked job can run; its KV cache may have come from elsewhere in the meantime."""
        if job := self.some(pick, JobState.BLOCKED):
            if loaded and self.room_to_load(job):
                job.handle.blocks, job.next_tokens = blocks_for(job.handle.num_tokens), 1
            self.planner.unblock(job, self.now_s)

    @rule(pick=picks)
    def stall(self, pick):
        if job := self.some(pick, *JobState):
            self.host.stalled.add(job)

    @precondition(lambda self: self.host.stalled)
    @rule()
    def output_arrives(self):
        self.host.stalled.clear()

    @rule(length=ticks)
    def wait(self, length):
        self.now_s += length * TICK_S

    @rule(base=st.integers(1, 8))
    def rebase(self, base):
        ladder = QuantumLadder(base * TICK_S / 2, 2.0, self.policy.num_levels)
        self.policy.set_ladder(ladder, self.planner.running)

    @rule()
    def observe(self):
        self.planner.observe(self.unobserved_s, self.now_s)
        self.step_s, self.unobserved_s = self.unobserved_s or self.step_s, 0.0

    # ---- what must hold -------------------------------------------------------------------

    @invariant()
    def integrity(self):
        self.planner.check_integrity()
        self.policy.compare(self.now_s)
        assert sum(self.planner.roster.counts().values()) == len(self.planner)
        assert len(self.planner) == self.arrived - self.left
        self.host.check_integrity(self.planner)
        if self.mode == "proactive":
            self.check_leavers()

    def check_leavers(self):
        """Every job that could leave is found, at the place that it has now."""
        leavers = self.planner.ahead._leavers
        if not leavers._asked:
            return
        groups = leavers._groups
        for job in self.planner.jobs:
            if job.state is JobState.PAUSED:
                for heap in groups[job.priority, -1 if job.turn_s is not None else job.level]:
                    entries = [(key, since_s) for _, _, j, key, since_s in heap if j is job]
                    assert (job.key, job.waiting_since_s) in entries, job

    def plan(self, options) -> tuple[StepPlan, StepLimits, dict[Job, JobState]]:
        """Plan a step, and check the plan; returns also the states before it."""
        limits = self.host.limits(self.planner, **options)
        states = {job: job.state for job in self.planner.jobs}
        self.policy.refresh()
        self.keys = {job: job.key for job in self.planner.jobs}
        declined = sum(self.planner.counters.declined.values())
        jobs = self.planner.jobs if self.mode == "proactive" else ()
        with called_up(jobs, limits, self.host, self.step_s) as called:
            expected = reference_plan(self.planner.jobs, limits, self.host)
            states |= dict.fromkeys(called, JobState.QUEUED)
        plan = self.planner.plan(limits, self.now_s)
        declined -= sum(self.planner.counters.declined.values())
        self.check_expected(plan, expected)
        self.check_states(plan, states)
        self.check_victims(plan, expected, states)
        self.check_limits(plan, limits, states)
        self.check_order(plan, limits, expected)
        if not declined:
            self.check_work_conserving(expected, limits, states)
        return plan, limits, states

    def check_expected(self, plan, expected: ReferencePlan):
        """The batch and the victims are those of the naive walk, but for whom leaves ahead."""
        spilled = [job for job in expected.recomputed if job in plan.spilled]
        given_up = [job for job in expected.recomputed if job not in plan.spilled]
        assert list(plan.spilled) == spilled
        assert list(plan.recomputed[: len(given_up)]) == given_up
        dropped = plan.recomputed[len(given_up) :]
        gone = {*plan.swapped_out, *dropped}
        assert len(gone) == len(plan.swapped_out) + len(dropped)
        assert list(plan.batch) == [job for job in expected.batch if job not in gone]
        assert self.mode != "recompute" or not plan.spilled
        assert self.mode == "proactive" or not (gone or plan.swapped_in)
        if expected.batch:
            assert min(expected.batch, key=self.keys.get) not in gone, "the first one stays"

    def check_states(self, plan, states):
        """The plan's lists agree with the state changes, and with nothing else."""
        after = {job: job.state for job in self.planner.jobs}
        lists = {
            JobState.RUNNING: plan.batch,
            JobState.PAUSED: plan.paused,
            JobState.SWAPPING_OUT: plan.swapped_out,
            JobState.SWAPPING_IN: plan.swapped_in,
        }
        where = JobState.SWAPPED if self.mode == "proactive" else JobState.QUEUED
        named = {job: state for state, jobs in lists.items() for job in jobs}
        named |= dict.fromkeys(plan.recomputed, JobState.QUEUED)
        named |= dict.fromkeys(plan.spilled, where)
        assert len(named) == sum(map(len, [*lists.values(), plan.recomputed, plan.spilled]))
        assert after == states | named
        assert len(plan.started) == len(set(plan.started))
        assert all(named.get(j, after[j]) in RESIDENT for j in plan.saved)
        ran = {job for job in after if states[job] is JobState.RUNNING}
        assert set(plan.started) == set(plan.batch) - ran
        assert {job for job in after if after[job] is JobState.RUNNING} == set(plan.batch)
        assert set(plan.paused) <= ran
        assert all(states[job] in RESIDENT for job in plan.swapped_out)
        assert all(states[job] is JobState.SWAPPED for job in plan.swapped_in)

    def check_victims(self, plan, expected: ReferencePlan, states):
        """A victim had KV cache and comes after a job of the batch that needed its room."""
        assert all(states[job] in RESIDENT for job in (*plan.recomputed, *plan.spilled))
        if not expected.recomputed:
            return
        needy = [
            job
            for job in expected.batch
            if states[job] is JobState.QUEUED or self.host.new_blocks(job) > 0
        ]
        first = min(map(self.keys.get, needy))
        assert all(first < self.keys[victim] for victim in expected.recomputed)

    def check_limits(self, plan, limits, states):
        """No limit is exceeded; blocks and tokens are checked again by the host, job by job."""
        assert len(plan.batch) <= limits.batch_limit
        if limits.max_adapters is not None:
            adapters = {job.handle.adapter for job in plan.batch} - {0}
            assert len(adapters) <= limits.max_adapters
        if self.host.slots is not None:
            assert self.planner.roster.num_residents <= self.host.slots
        if limits.overlapping:
            assert not set(plan.batch) & self.host.stalled
        if not limits.admit_queued:
            assert all(self.host.holds_kv(job) for job in plan.batch)

    def check_order(self, plan, limits, expected: ReferencePlan):
        """I9: who stands before a job of the batch and is not in it was told why."""
        if not plan.batch:
            return
        last, batch = max(map(self.keys.get, plan.batch)), set(plan.batch)
        queued, turned_away = set(queued_jobs(self.planner)), False
        victims = set(expected.recomputed)
        gone = {*plan.swapped_out, *plan.recomputed} - victims
        for job in sorted(expected.verdicts, key=self.keys.get):
            # A victim's memory goes to nobody behind it who holds none yet.
            turned_away |= job is expected.partial or job in victims
            if job in batch or self.keys[job] > last or job in gone:
                continue
            if expected.verdicts[job] is Verdict.DECLINED:
                turned_away |= job in queued
                continue
            assert expected.verdicts[job] is Verdict.SKIPPED
            in_flight = limits.overlapping and job in self.host.stalled
            assert in_flight or job in victims or (turned_away and job in queued)

    def check_work_conserving(self, expected, limits, states):
        """I9: where nobody was declined, the batch is the first of the jobs that are ready.

        But for those that leave ahead of need, whose places stay empty in this step, and for those
        without KV cache behind one that has to come back: it has been promised the room.
        """
        keys = self.keys
        swapped = [keys[job] for job, state in states.items() if state is JobState.SWAPPED]
        ready = [
            job
            for job, state in states.items()
            if state in (*RESIDENT, JobState.QUEUED)
            and not (limits.overlapping and job in self.host.stalled)
            and (limits.admit_queued or state in RESIDENT or self.host.holds_kv(job))
            and (
                state in RESIDENT
                or self.host.holds_kv(job)
                or not swapped
                or keys[job] < min(swapped)
            )
            and job not in expected.recomputed
        ]
        victims = [keys[job] for job in expected.recomputed]
        if victims:
            ready = [
                job
                for job in ready
                if states[job] in RESIDENT or self.host.holds_kv(job) or keys[job] < min(victims)
            ]
        first = sorted(ready, key=keys.get)[: limits.batch_limit]
        wanted = sum(min(job.next_tokens, limits.prefill_chunk) for job in first)
        if wanted <= limits.token_budget:
            assert sorted(expected.batch, key=keys.get) == first

    # ---- helpers --------------------------------------------------------------------------

    def some(self, pick, *states) -> Job | None:
        jobs = [job for job in self.planner.jobs if job.state in states]
        return pick.choice(jobs) if jobs else None

    def room_to_load(self, job) -> bool:
        """Loads leave room for any one job to run: nobody can take back what they hold."""
        loaded = sum(job.handle.blocks for job in queued_jobs(self.planner))
        blocks = blocks_for(job.handle.num_tokens)
        spare = min(self.host.num_blocks - 18 - loaded, self.host.free_blocks(self.planner))
        return blocks <= spare

    def remove_some(self, pick, *states):
        if job := self.some(pick, *states):
            self.remove(job)

    def remove(self, job):
        self.planner.remove(job)
        self.host.drop(job)
        self.host.stalled.discard(job)
        self.left += 1

    def teardown(self):
        """Left alone, every job finishes, and nothing is left behind.

        Turns go on meanwhile: they lead somewhere. Promotion by the absolute rule ends: where
        it sets in sooner than a step ends, nobody keeps KV cache for long enough.
        """
        if not hasattr(self, "planner"):
            return
        self.host.stalled.clear()
        if not isinstance(self.policy.ageing, RelativeAgeing):
            self.policy.stop_ageing()
        for job in [job for job in self.planner.jobs if job.state is JobState.BLOCKED]:
            self.planner.unblock(job, self.now_s)
        steps = (
            10
            * (1 + self.host.copy_steps)
            * sum(job.handle.prompt + job.handle.output for job in self.planner.jobs)
        )
        while len(self.planner) and steps:
            self.run_step({"batch_limit": 3, "token_budget": 16}, length=4)
            self.integrity()
            steps -= 1
        assert len(self.planner) == 0, "a job never finishes"
        assert self.policy.level_sizes == [0] * self.policy.num_levels
        assert len(self.policy._waiting) == len(self.policy._overdue) == 0
        assert len(self.policy._expiries) == 0
        assert self.policy._turn_classes == []


PolicyMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, report_multiple_bugs=False
)
TestPolicyMachine = PolicyMachine.TestCase


def busy_trace(seed: int, mode: str) -> PolicyMachine:
    """A machine driven through a few hundred events that keep the device short of memory."""
    dice = random.Random(f"{mode} {seed}")
    machine = PolicyMachine()
    machine.build(
        base=dice.randint(1, 8),
        levels=dice.randint(2, 6),
        ageing=random_ageing(dice),
        weight=dice.choice([0.0, 1.0, 8.0]),
        skip_join=dice.random() < 0.5,
        learns=dice.random() < 0.5,
        share=dice.choice([None, 0.25]),
        blocks=dice.randint(18, 50),
        slots=dice.choice([None, None, 3, 8]),
        headroom=dice.randint(0, 2),
        mode=mode,
        host={
            "host_blocks": dice.choice([0, 12, 40, 1000, 1000]),
            "copy_steps": dice.randint(0, 4),
            "block_copy_s": dice.choice([0.0, TICK_S / 64, TICK_S / 4]),
            "token_s": dice.choice([0.0, TICK_S / 4, 4 * TICK_S]),
        },
    )
    options = {"batch_limit": dice.randint(2, 6), "token_budget": dice.choice([16, 64])}
    others = [machine.abort, machine.host_preempts, machine.block, machine.stall]
    for _ in range(300):
        event = dice.random()
        if event < 0.05 and len(machine.planner) < 30:
            machine.crowd(seed=dice.randrange(1 << 16), number=dice.randint(2, 8))
        elif event < 0.07:
            dice.choice(others)(pick=dice)
        elif event < 0.09:
            machine.unblock(pick=dice, loaded=dice.random() < 0.5)
            machine.host.stalled.clear()
        elif event < 0.10 and machine.host.copies:
            machine.copy_fails(pick=dice)
        else:
            narrow = {"overlapping": dice.random() < 0.3, "admit_queued": dice.random() < 0.97}
            machine.run_step(options | narrow, dice.randint(1, 6))
        machine.integrity()
    return machine


@pytest.mark.parametrize("mode", MODES)
def test_busy_traces(mode):
    """The laws hold where memory is always short, and the traces do what they are meant to do."""
    moved = Counter()
    for seed in range(8):
        machine = busy_trace(seed, mode)
        machine.teardown()
        counters = machine.planner.counters
        assert machine.host.host_blocks or not (counters.spilled or counters.swapped_out)
        moved.update(
            recomputed=counters.recomputed,
            spilled=counters.spilled,
            swapped_out=counters.swapped_out,
            swapped_in=counters.swapped_in,
        )
    wanted = {"recompute": ["recomputed"], "reactive": ["recomputed", "spilled"]}
    assert all(moved[name] > 30 for name in wanted.get(mode, list(moved)))
