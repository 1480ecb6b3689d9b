"""Fleets of simulated replicas: one is the engine itself, nobody is lost, routers choose well."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from test_simulator import (
    KV,
    MODES,
    SLOTS,
    figures,
    make_shape,
    outputs_elsewhere,
    serve,
    trace,
)

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.simulator.fleet import Fleet
from fastserve_vllm.simulator.fleet_size import fewest_replicas
from fastserve_vllm.simulator.routers import ROUTERS, LeastLoaded, PrefixAffine, RoundRobin
from fastserve_vllm.simulator.run import simulate_fleet
from fastserve_vllm.traces import Request


def make_fleet(
    replicas: int, router: str = "least-loaded", *, leap: bool = True, **options
) -> Fleet:
    regime = {name: options.pop(name) for name in [*options] if name in KV}
    config = FastServeConfig.parse(options)
    return Fleet(make_shape(**regime), config, replicas, ROUTERS[router](), leap=leap)


def with_prefixes(requests: list[Request], kinds: int, tokens: int) -> list[Request]:
    """The requests, with one of so many prefixes each."""
    dice = random.Random(1)
    return [
        dataclasses.replace(
            one,
            prefix=f"p{dice.randrange(kinds)}",
            prefix_tokens=tokens,
            prompt_tokens=one.prompt_tokens + tokens,
        )
        for one in requests
    ]


class TestOneReplica:
    """A fleet of one is the engine that `fastserve simulate` uses: not a bit differs."""

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("policy", ["fcfs", "fastserve"])
    @pytest.mark.parametrize("router", ROUTERS)
    def test_it_is_the_engine(self, seed, policy, router):
        """Where places are short, with every router."""
        requests = trace(seed, 80)
        alone = serve(requests, make_shape(**SLOTS), policy=policy)
        assert list(make_fleet(1, router, policy=policy, **SLOTS).serve(requests)) == alone

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("mode", MODES)
    def test_it_is_the_engine_where_memory_is_short(self, seed, mode):
        """And KV cache moves, so that an engine also waits for copies alone."""
        requests = trace(seed, 80)
        alone = serve(requests, make_shape(**KV), swap_mode=mode)
        assert list(make_fleet(1, swap_mode=mode, **KV).serve(requests)) == alone

    def test_arrivals_at_one_time_are_in_one_step(self):
        """All of those that come at once, and at a time at which a step ends."""
        requests = [Request(f"{n}", 0.0, 20, 30) for n in range(12)]
        alone = serve(requests, make_shape())
        ends_s = sorted({one.last_token_s for one in alone})
        requests += [Request(f"at{n}", ends_s[0], 20, 3) for n in range(3)]
        alone = serve(requests, make_shape())
        assert list(make_fleet(1).serve(requests)) == alone


class TestConservation:
    @pytest.mark.parametrize("router", ROUTERS)
    @pytest.mark.parametrize("mode", MODES)
    def test_every_request_is_served_once(self, router, mode):
        """By one replica; blocks and jobs are conserved in each after every event."""
        requests = with_prefixes(trace(2, 120, gap_s=0.02), kinds=9, tokens=40)
        fleet = make_fleet(3, router, swap_mode=mode, **KV)
        step, checked = fleet._next, []

        def step_and_check():
            served = step()
            fleet.check_integrity()
            checked.append(1)
            return served

        fleet._next = step_and_check
        served = [one.request.id for one in fleet.serve(requests)]
        assert sorted(served) == sorted(one.id for one in requests)
        assert len(checked) > 300
        assert sum(replica.got for replica in fleet.replicas) == len(requests)
        assert [replica.unfinished for replica in fleet.replicas] == [0] * 3
        for replica in fleet.replicas:
            assert replica.engine.kv.device.count == replica.engine.shape.device_blocks

    def test_leaps_change_nothing(self):
        """The neighbours' arrivals leave a leap alone, its own cut it, and no router notices."""
        requests = trace(4, 150, gap_s=0.02)
        leapt = figures(list(make_fleet(3, **SLOTS).serve(requests)))
        stepped = figures(list(make_fleet(3, leap=False, **SLOTS).serve(requests)))
        assert leapt.keys() == stepped.keys()
        for name, expected in stepped.items():
            assert leapt[name] == pytest.approx(expected, rel=0, abs=1e-9), name


class TestSameBytes:
    """I7."""

    PROGRAM = """
import json, sys
sys.path.insert(0, {here!r})
from test_fleet import make_fleet, trace, with_prefixes
from test_simulator import KV, figures
fleet = make_fleet(3, {router!r}, **KV)
requests = with_prefixes(trace(3, 60), 4, 30)
print(json.dumps(figures(list(fleet.serve(requests)))))
"""

    @pytest.mark.parametrize("router", ROUTERS)
    def test_another_process_gives_the_same_bytes(self, router):
        """Whatever the seed of its hashes is."""
        program = self.PROGRAM.format(here=str(Path(__file__).parent), router=router)
        requests = with_prefixes(trace(3, 60), 4, 30)
        here = figures(list(make_fleet(3, router, **KV).serve(requests)))
        assert outputs_elsewhere(program) == {(json.dumps(here) + "\n").encode()}


@dataclasses.dataclass
class Seen:
    """A replica as a router sees it."""

    unfinished: int
    waiting: int = 0
    kv_usage: float = 0.0


ANY = Request("any", 0.0, 10, 10)


class TestRouters:
    def test_round_robin(self):
        """One after the other, whatever their load."""
        router, replicas = RoundRobin(), [Seen(9), Seen(0), Seen(5)]
        assert [router.choose(ANY, replicas) for _ in range(5)] == [0, 1, 2, 0, 1]

    def test_least_loaded(self):
        """The fewest unfinished requests."""
        assert LeastLoaded().choose(ANY, [Seen(3), Seen(1), Seen(2)]) == 1

    def test_equally_loaded(self):
        """They take turns, so a burst does not all go to the first."""
        router, replicas = LeastLoaded(), [Seen(2), Seen(2), Seen(2), Seen(3)]
        assert [router.choose(ANY, replicas) for _ in range(5)] == [0, 1, 2, 0, 0]

    def test_who_waits_for_memory_counts_for_more(self):
        """At a full device three times as much again: 4 + 2 * 3 against 9."""
        router = LeastLoaded()
        assert router.choose(ANY, [Seen(4, 2, 0.5), Seen(9)]) == 0
        assert router.choose(ANY, [Seen(4, 2, 1.0), Seen(9)]) == 1

    def test_prefix_affine(self):
        """A prefix stays where it went first; requests without one are spread."""
        router, replicas = PrefixAffine(), [Seen(0)] * 8
        names = [f"p{n}" for n in range(40)]
        ask = [dataclasses.replace(ANY, prefix=name) for name in names]
        homes = [router.choose(one, replicas) for one in ask]
        assert len(set(homes)) > 4
        assert [router.choose(one, replicas) for one in ask] == homes
        assert len({router.choose(ANY, replicas) for _ in range(40)}) > 4

    def test_a_replica_tells_who_waits(self):
        """Requests without a place on the device, those that came in the step among them."""
        fleet, seen = make_fleet(1, policy="fcfs", **SLOTS), []
        choose = fleet.router.choose

        def choose_and_see(request, replicas):
            seen.append((replicas[0].unfinished, replicas[0].waiting))
            return choose(request, replicas)

        fleet.router.choose = choose_and_see
        list(fleet.serve([Request(f"{n}", 0.001 * n, 200, 50) for n in range(10)]))
        assert seen[0] == (0, 0)
        assert seen[-1][0] == 9
        assert 0 < seen[-1][1] < 9

    def test_least_loaded_beats_round_robin(self):
        """It sees how long answers are, if only when they take long."""
        requests = trace(0, 600, gap_s=0.013)
        mean = {
            router: simulate_fleet(make_fleet(4, router, policy="fcfs", **SLOTS), requests)
            for router in ("round-robin", "least-loaded")
        }
        mean = {router: document["ttft_ms"]["mean"] for router, document in mean.items()}
        assert mean["least-loaded"] < mean["round-robin"]


class TestSharedPrefixes:
    def prefilled(self, requests: list[Request], router: str, replicas: int = 4, **regime) -> int:
        fleet = make_fleet(replicas, router, **(regime or SLOTS))
        return simulate_fleet(fleet, requests)["prefill_tokens"]

    def test_a_replica_computes_a_prefix_once(self):
        """One after the other: the full blocks of the prefix are there, the rest is computed."""
        requests = [Request(f"{n}", 10.0 * n, 100, 5, "p", 70) for n in range(4)]
        # 70 tokens are 4 full blocks of 16.
        assert self.prefilled(requests, "least-loaded", replicas=1) == 100 + 3 * (100 - 64)

    def test_affinity_saves_prefills(self):
        """Where prefixes are many, each replica computes each of them under another router."""
        requests = with_prefixes(trace(5, 200, gap_s=0.05), kinds=20, tokens=160)
        affine = self.prefilled(requests, "prefix-affine")
        assert affine < 0.9 * self.prefilled(requests, "round-robin")

    def test_what_was_overwritten_is_computed_again(self):
        """Others' KV cache took the blocks meanwhile."""
        first, last = (Request(n, t, 100, 5, "p", 70) for n, t in (("a", 0.0), ("z", 99.0)))
        between = [Request(f"{n}", 10.0 + n, 600, 40) for n in range(8)]
        many = self.prefilled([first, *between, last], "least-loaded", replicas=1, **KV)
        assert many == 100 + 8 * 600 + 100


class TestSizes:
    """The search: right where more always helps, and never without proof where it does not."""

    @pytest.mark.parametrize("least", [1, 3, 20])
    @pytest.mark.parametrize("need", [1, 2, 3, 7, 20, 21, 40, 63, 64, 65])
    def test_monotone(self, least, need):
        """The smallest that meets the targets, each asked once; None beyond the largest."""
        asked = []
        found = fewest_replicas(lambda n: (asked.append(n), n >= need)[1], least, 64)
        assert found == (max(need, least) if need <= 64 else None)
        assert len(asked) == len(set(asked)) <= 16
        assert all(least <= size <= 64 for size in asked)

    @pytest.mark.parametrize("seed", range(50))
    def test_luck_is_not_enough(self, seed):
        """What is found meets the targets, one fewer does not, and one more does, too."""
        dice = random.Random(seed)
        meets = {size: size > 30 or dice.random() < 0.4 for size in range(1, 41)}
        found = fewest_replicas(meets.__getitem__, 1, 40)
        assert meets[found]
        assert meets[min(found + 1, 40)]
        assert found == 1 or not meets[found - 1]


class TestRefused:
    def test_no_replicas(self):
        """The message names the field."""
        with pytest.raises(ValueError, match="replicas must be at least 1, got 0"):
            make_fleet(0)

    def test_arrivals_out_of_order(self):
        """As for one engine."""
        with pytest.raises(ValueError, match="request b arrives out of order"):
            list(make_fleet(2).serve([Request("a", 1.0, 5, 5), Request("b", 0.5, 5, 5)]))

    def test_a_request_that_can_never_fit(self):
        """As for one engine."""
        with pytest.raises(ValueError, match="request big needs 4063 KV blocks"):
            list(make_fleet(2).serve([Request("big", 0.0, 60000, 5000)]))
