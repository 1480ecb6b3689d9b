"""Drives the real scheduler at random and checks its laws after every step.

    make fuzz STEPS=N SEED=N        0 steps: until interrupted

A run consists of worlds: engines of different sizes and modes that live for some hundred steps and
are then left alone until they have finished everything. A failure names the world that failed,
which `--seed` runs again.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

from fuzz_engine import FuzzEngine
from kv_contents import expected_answer
from reference import called_up, reference_plan
from vllm.v1.core.sched.interface import PauseState

from fastserve_vllm.policy.job import JobState
from fastserve_vllm.policy.mlfq import SkipJoinMlfq
from fastserve_vllm.testing import vllm_config

# Times are multiples of a power of two, so that what the policy and its reference add up is equal.
TICK_S = 2.0**-12
PROFILE = {
    "step_s": 4 * TICK_S,
    "prefill_token_s": TICK_S / 64,
    "decode_s": 0.0,
    "context_token_s": 0.0,
    "base_quantum_s": 4 * TICK_S,
}
WORLD_STEPS = 250
LIMIT_S = 256 * TICK_S
RESIDENT = (JobState.RUNNING, JobState.PAUSED)


class World:
    """One engine, what was asked of it, and the laws that it has to keep.

    Args:
        model: path of a model folder.
        seed: of every choice that is made.
        profile: path of the step-time profile.
    """

    may_be_calm = True
    limits = (1, 2, 4, 6)
    sizes = (14, 20, 40, 200)
    depths = (1, 2, 3)

    def __init__(self, model, seed, profile):
        self.dice = dice = random.Random(seed)
        self.calm = self.may_be_calm and seed % 4 == 3
        self.limit = dice.choice(self.limits)
        self.blocks = 2048 if self.calm else dice.choice(self.sizes)
        self.wanted, self.aborted, self.tables = {}, set(), Counter()
        self.delivered = Counter()
        fastserve = {
            "step_time_profile": profile,
            "policy": dice.choice(["fastserve"] * 4 + ["mlfq", "fcfs", "fixed-priority"]),
            "swap_mode": dice.choice(["proactive", "proactive", "reactive", "recompute"]),
            "swap_space_gib": dice.choice([4e-3, 5e-4, 1e-4, 9e-6]),
            "starvation_limit_s": dice.choice(["off", 64 * TICK_S, 1024 * TICK_S]),
            "ageing": dice.choice(["absolute", "relative"]),
            "num_levels": dice.choice([None, 2, 4, 10]),
            "service_weight": dice.choice([None, 0.0, 1.0]),
            "first_token_share": dice.choice([None, 0.05]),
            "learn_lengths": dice.choice([None, False]),
        }
        if self.calm:
            fastserve |= {"policy": "fastserve", "starvation_limit_s": LIMIT_S}
        self.depth = dice.choice(self.depths)
        engine = {
            "max_num_seqs": 2 * self.limit,
            "max_num_active_seqs": self.limit,
            "max_model_len": 400,
            "max_num_batched_tokens": 2048 if self.calm else dice.choice([32, 128, 2048]),
            "enable_prefix_caching": dice.random() < 0.5,
            **{1: {}, 2: {"async_scheduling": True}, 3: {"pipeline_parallel_size": 3}}[self.depth],
        }
        self.described = {"seed": seed, "blocks": self.blocks, **engine, **fastserve}
        self.engine = self._engine(model, fastserve, engine)
        self.scheduler = self.engine.scheduler
        if not self.calm:
            self.scheduler.use_v2_model_runner = dice.random() < 0.3
        self.engine.runner.keeps_tokens = self.scheduler.use_v2_model_runner
        self.waits, self.levels = {}, {}
        self._watch_plans()

    def _engine(self, model, fastserve, args):
        config = vllm_config(model, fastserve, **args)
        return FuzzEngine(
            config,
            self.blocks,
            dice=self.dice,
            failure_rate=self.failure_rate(),
            delay_rate=self.dice.choice([0.0, 0.5, 0.9]),
            step_s=lambda _: self.step_s(),
        )

    def failure_rate(self):
        """Share of the copies that fail."""
        return self.dice.choice([0.0, 0.0, 0.02, 0.3])

    def step_s(self):
        """A step now and then takes a hundred times the usual."""
        length = self.dice.randint(4, 16)
        slow = not self.calm and self.dice.random() < 0.01
        return (100 * length if slow else length) * TICK_S

    # ---- what can happen --------------------------------------------------------------------

    def run(self, steps):
        """So many steps with events between them; then everything left finishes."""
        for _ in range(steps):
            self.event()
            self.step()
        self.settle()

    def event(self):
        if self.calm:
            if len(self.scheduler.requests) < 2 * self.limit:
                self.add()
            return
        dice, roll = self.dice, self.dice.random()
        if roll < 0.15 and len(self.scheduler.requests) < 24:
            for _ in range(dice.choice([1, 1, 1, 8])):
                self.add()
        elif roll < 0.18:
            self.abort(dice.choice([1, 1, 3, 1000]))
        elif roll < 0.19:
            self.reset(running=dice.random() < 0.5)
        elif roll < 0.20:
            state = dice.choice(list(PauseState))
            self.scheduler.set_pause_state(state)
        elif roll < 0.23:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)
        elif roll < 0.24:
            self.engine.clock.now_s += dice.choice([1, 64, 4096, 1 << 24]) * TICK_S

    def reset(self, *, running):
        """VLLM gives up where an aborted request holds blocks that are still being copied."""
        try:
            self.scheduler.reset_prefix_cache(reset_running_requests=running)
        except RuntimeError:
            assert any(request.is_finished() for request in self.scheduler.requests.values())
            self.tables["resets refused"] += 1

    def add(self):
        dice, name = self.dice, f"r{len(self.wanted)}"
        prompt = self.prompt()
        self.wanted[name] = expected_answer(prompt, dice.choice([1, 2, 10, 30, 80]))
        priority = 0 if self.calm else dice.choice([0, 0, 0, 0, -1, 1])
        self.engine.add(name, prompt, len(self.wanted[name]), priority=priority)

    def prompt(self):
        """Some begin alike."""
        shared = [5] * self.dice.choice([0, 0, 32, 64, 70])
        return shared + [self.dice.randrange(10, 500) for _ in range(self.dice.randint(1, 180))]

    def abort(self, count):
        live = [r for r in self.scheduler.requests if not self.scheduler.requests[r].is_finished()]
        gone = self.dice.sample(live, min(count, len(live)))
        self.aborted.update(gone)
        self.engine.abort(*gone)

    def step(self):
        """Schedule and complete, with up to `depth` steps in flight; then check the laws."""
        engine = self.engine
        if len(engine.in_flight) < self.depth:
            for name in engine.schedule().num_scheduled_tokens:
                self.waits.pop(name, None)
        self.check()
        if engine.in_flight and (len(engine.in_flight) >= self.depth or self.dice.random() < 0.3):
            engine.complete()
            self.check()

    def settle(self):
        """Left alone, every request finishes with the tokens it asked for; nothing stays behind."""
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        for _ in range(60_000):
            if not self.engine.busy and not self.scheduler.requests:
                break
            self.step()
        while self.engine.in_flight:
            self.engine.complete()
        self.check()
        assert not self.scheduler.requests, f"never finished: {list(self.scheduler.requests)}"
        assert len(self.scheduler.planner) == 0
        outputs = self.engine.outputs
        for name, tokens in self.wanted.items():
            assert name in self.aborted or len(outputs[name]) == len(tokens), name
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.blocks - 1, "I4: device blocks stay behind"
        if (exchange := self.scheduler.exchange) is not None:
            assert exchange.manager.in_flight == 0
            assert exchange.manager.free_blocks == exchange.host_blocks, "I4: host blocks"

    # ---- what must hold ---------------------------------------------------------------------

    def check(self):
        """I1 to I4 and I6; I9 is checked where a plan is made."""
        self.scheduler.check_integrity()
        self._check_blocks()
        self._check_tokens()
        if self.calm:
            self._check_waits()

    def _check_blocks(self):
        """I4: a device block has as many owners as it counts."""
        manager = self.scheduler.kv_cache_manager
        owners = Counter(
            block
            for group in manager.coordinator.single_type_managers
            for blocks in group.req_to_blocks.values()
            for block in {block.block_id: block.block_id for block in blocks}
        )
        owners.update(block.block_id for _, held in self.scheduler.deferred_frees for block in held)
        pool = manager.block_pool
        for block in pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == owners[block.block_id], f"I4: {block}"
        used = sum(owners[block.block_id] > 0 for block in pool.blocks if not block.is_null)
        assert pool.get_num_free_blocks() == self.blocks - 1 - used, "I4"

    def _check_tokens(self):
        """I5 and I10: nobody gets a token that was computed on other than its own KV cache."""
        for name, tokens in self.engine.outputs.items():
            if (seen := self.delivered[name]) < len(tokens):
                new, right = tokens[seen:], self.wanted[name][seen : len(tokens)]
                assert new == right, f"I10: {name} got {new} after {seen} tokens, not {right}"
                self.delivered[name] = len(tokens)

    def _check_waits(self):
        """I6, where no more wait than the batch holds and nothing else binds."""
        now_s = self.engine.clock.now_s
        for name in self.scheduler.requests:
            self.waits.setdefault(name, now_s)
        self.waits = {n: s for n, s in self.waits.items() if n in self.scheduler.requests}
        bound_s = LIMIT_S + 4 * (self.limit + self.depth + 1) * 16 * TICK_S
        late = {n: now_s - s for n, s in self.waits.items() if now_s - s > bound_s}
        assert not late, f"I6: {late}"

    def _check_service(self, jobs):
        """I2 and I3, when the steps that ended have been charged: the ladder here is fixed."""
        policy = self.scheduler.planner.policy
        quanta_s = policy.ladder.quanta_s
        for job in jobs:
            level, ran = self.levels.get(job, (job.level, False))
            blocked = job.state is JobState.BLOCKED
            allowed = {level, 0, level + 1} if ran else {level, 0}
            assert blocked or job.level in allowed, f"I2: {job} was in level {level}"
            counts = job.turn_s is None and job.level < policy.num_levels - 1
            if job.state is JobState.RUNNING and counts:
                attained_s = policy.attained_service_s(job)
                assert attained_s < quanta_s[job.level] + job.grace_s, f"I3: {job}"

    def _watch_plans(self):
        """Compare every plan with that of a walk over all sorted jobs."""
        planner, make = self.scheduler.planner, self.scheduler.planner.plan

        def checked(limits, now_s):
            jobs = list(planner.jobs)
            if isinstance(planner.policy, SkipJoinMlfq):
                self._check_service(jobs)
            before = {job: job.state for job in jobs}
            # The planner does so itself, but only where a place may be lost.
            planner.roster.refresh(planner.policy)
            step_s = 0.0 if planner.ahead is None else planner.ahead.step_s
            with called_up(jobs, limits, self.scheduler.exchange, step_s):
                expected = reference_plan(jobs, limits, self.scheduler.demand)
            plan = make(limits, now_s)
            self.tables["plans"] += 1
            gone = {*plan.swapped_out, *plan.recomputed} - set(expected.recomputed)
            wanted = [job for job in expected.batch if job not in gone]
            assert list(plan.batch) == wanted, "I9: not the batch that the order gives"
            assert len(plan.batch) <= limits.batch_limit
            assert all(before[job] in RESIDENT for job in (*plan.recomputed, *plan.spilled))
            self.levels = {j: (j.level, j.state is JobState.RUNNING) for j in planner.jobs}
            return plan

        planner.plan = checked


class FailingWorld(World):
    """KV cache moves all the time, mostly for a step that waits, and a third of the copies fail.

    Steps overlap, most requests begin alike, and clients go away in the middle of it all.
    """

    may_be_calm = False
    limits = (1, 2, 3)
    sizes = (14, 20)
    depths = (2, 3)

    def failure_rate(self):
        return 0.3

    def _engine(self, model, fastserve, args):
        scarce = {
            "swap_mode": self.dice.choice(["reactive", "reactive", "proactive"]),
            "swap_space_gib": self.dice.choice([4e-3, 5e-4]),
            "policy": self.dice.choice(["fastserve", "mlfq"]),
            "ageing": "relative",
            "starvation_limit_s": self.dice.choice([64 * TICK_S, 256 * TICK_S]),
        }
        batch = {"enable_prefix_caching": self.dice.random() < 0.8, "max_num_batched_tokens": 2048}
        self.described |= scarce | batch
        return super()._engine(model, fastserve | scarce, args | batch)

    def event(self):
        """Besides, many wait at any time, and somebody who runs goes away now and then."""
        while len(self.scheduler.requests) < 10:
            self.add()
        super().event()
        running = [r.request_id for r in self.scheduler.running if not r.is_finished()]
        if running and self.dice.random() < 0.04:
            gone = self.dice.choice(running)
            self.aborted.add(gone)
            self.engine.abort(gone)

    def prompt(self):
        """Others may find the blocks that a failed copy should have filled."""
        shared = [5] * self.dice.choice([32, 64, 96, 128])
        return shared + [self.dice.choice([6, 7]) for _ in range(self.dice.randint(1, 60))]


def fuzz(model, profile, steps, seed=0, report=lambda text: None, kind=World):
    """Run worlds until `steps` steps were planned (0: for ever); returns what happened, counted."""
    total, world = Counter(), None
    while not steps or total["plans"] < steps:
        try:
            world = kind(model, seed, profile)
            world.run(WORLD_STEPS)
        except Exception as error:
            described = world.described if world else seed
            raise AssertionError(f"fuzz seed {seed} failed: {described}") from error
        total += world.tables + counted(world)
        total["worlds"] += 1
        seed += 1
        if total["worlds"] % 20 == 0:
            report(f"{total['plans']} steps, {total['worlds']} worlds, next seed {seed}")
    return total


def counted(world):
    """What a world did, so that a run can show that it did what it is for."""
    counters, exchange = world.scheduler.planner.counters, world.scheduler.exchange
    names = ("started", "paused", "recomputed", "spilled", "swapped_out", "swapped_in", "saved")
    found = Counter({name: getattr(counters, name) for name in names})
    found["aborted"] = len(world.aborted)
    found["requests"] = len(world.wanted)
    found[f"depth {world.depth}"] = 1
    found["calm"] = world.calm
    if exchange is not None:
        found["copies failed"] = world.engine.failed
        found["misled"] = world.engine.runner.misled
    return found


def write_profile(folder):
    """The step-time profile that all worlds share."""
    path = Path(folder) / "profile.json"
    path.write_text(json.dumps(PROFILE))
    return str(path)


def main():
    parser = argparse.ArgumentParser(description="Fuzz the scheduler.")
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=100_000, help="0: until interrupted")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = fuzz(options.model, write_profile(folder), options.steps, options.seed, print)
    print(dict(done))


if __name__ == "__main__":
    main()
