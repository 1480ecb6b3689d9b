"""Invariants I4 and I5 of the swap manager, whatever happens to requests and transfers."""

from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from swap_fake_engine import EngineConfig, FakeEngine, Place

picks = st.integers(0, 1 << 16).map(Random)
GROUPS = {
    "one group": ((4,), (None,)),
    "two of a kind": ((4, 4), (None, None)),
    "a sliding window": ((4, 4), (None, 6)),
    "different sizes": ((4, 2), (None, 5)),
    "windows only": ((2, 4, 4), (3, 9, None)),
}
MOVING = (Place.LEAVING, Place.COMING)


class SwapMachine(RuleBasedStateMachine):
    """Everything that can happen to a copy, in any order, with pools of any size."""

    @initialize(
        host=st.integers(0, 40),
        device=st.integers(31, 60),
        groups=st.sampled_from(list(GROUPS.values())),
        workers=st.integers(1, 3),
        failures=st.sampled_from([0.0, 0.1, 0.4]),
        pick=picks,
    )
    def build(self, host, device, groups, workers, failures, pick):
        sizes, windows = groups
        config = EngineConfig(host, device, sizes, windows, workers, failures, probe_rate=1.0)
        self.engine = FakeEngine(pick, config)
        for _ in range(3):
            self.engine.arrive()

    @rule(pick=picks, urgent=st.booleans())
    def swap_out(self, pick, urgent):
        self.act(pick, Place.RESIDENT, lambda r: self.engine.swap_out(r, urgent=urgent))

    @rule(pick=picks, urgent=st.booleans())
    def swap_in(self, pick, urgent):
        self.act(pick, Place.AWAY, lambda r: self.engine.swap_in(r, urgent=urgent))

    @rule(pick=picks)
    def save(self, pick):
        self.act(pick, Place.RESIDENT, self.engine.save)

    @rule(pick=picks)
    def compute(self, pick):
        self.act(pick, Place.NOWHERE, self.engine.admit)
        for request in self.engine.all(Place.RESIDENT):
            self.engine.plan(request)
        self.engine.step()

    @rule(pick=picks)
    def plan(self, pick):
        self.act(pick, Place.RESIDENT, self.engine.plan)

    @rule(pick=picks, anywhere=st.booleans())
    def leave(self, pick, anywhere):
        places = Place if anywhere else MOVING
        self.act(pick, places, self.engine.leave)
        self.engine.arrive()

    @rule(pick=picks, anywhere=st.booleans())
    def invalidate(self, pick, anywhere):
        self.act(pick, Place if anywhere else MOVING, self.engine.invalidate)

    @rule(weights=st.booleans())
    def invalidate_all(self, weights):
        self.engine.invalidate_all(weights=weights)

    @rule(pick=picks)
    def step(self, pick):
        self.engine.pick = pick
        self.engine.step()

    @rule(pick=picks, times=st.integers(1, 3))
    def work(self, pick, times):
        self.engine.pick = pick
        for _ in range(times):
            self.engine.work()

    @rule(pick=picks)
    def report(self, pick):
        self.engine.pick = pick
        self.engine.report()

    @invariant()
    def integrity(self):
        if hasattr(self, "engine"):
            self.engine.check()

    def act(self, pick, places, action):
        self.engine.pick = pick
        request = self.engine.some(*([places] if isinstance(places, Place) else places))
        if request is not None:
            action(request)

    def teardown(self):
        if hasattr(self, "engine"):
            self.engine.drain()


SwapMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    report_multiple_bugs=False,
)
TestSwapMachine = SwapMachine.TestCase

WEIGHTS = {
    "step": 20, "work": 20, "report": 14, "plan": 20, "admit": 5, "save": 5, "out": 7,
    "urgent out": 5, "in": 7, "urgent in": 5, "leave": 0.7, "arrive": 3,
    "invalidate": 0.3, "reset": 0.1, "weights": 0.1,
}  # fmt: skip


def act(engine: FakeEngine, event: str) -> None:
    """One event of a long drive."""
    places = {
        "admit": Place.NOWHERE,
        "save": Place.RESIDENT,
        "out": Place.RESIDENT,
        "urgent out": Place.RESIDENT,
        "in": Place.AWAY,
        "urgent in": Place.AWAY,
    }
    whole = {
        "step": engine.step,
        "plan": lambda: [engine.plan(r) for r in engine.all(Place.RESIDENT)],
        "work": lambda: [engine.work() for _ in range(3)],
        "report": engine.report,
        "arrive": engine.arrive,
        "reset": lambda: engine.invalidate_all(weights=False),
        "weights": lambda: engine.invalidate_all(weights=True),
    }
    if event in whole:
        whole[event]()
        return
    request = engine.some(*([places[event]] if event in places else []))
    if request is None:
        return
    actions = {
        "admit": engine.admit,
        "save": engine.save,
        "out": lambda r: engine.swap_out(r, urgent=False),
        "urgent out": lambda r: engine.swap_out(r, urgent=True),
        "in": lambda r: engine.swap_in(r, urgent=False),
        "urgent in": lambda r: engine.swap_in(r, urgent=True),
        "leave": engine.leave,
        "invalidate": engine.invalidate,
    }
    actions[event](request)


@pytest.mark.parametrize("groups", GROUPS)
def test_a_long_drive(groups):
    """20,000 events each, 100,000 in all: nothing is lost, mixed up or left behind."""
    sizes, windows = GROUPS[groups]
    seed = list(GROUPS).index(groups)
    config = EngineConfig(
        host_blocks=[16, 30, 24, 40, 12][seed],
        device_blocks=48,
        block_tokens=sizes,
        windows=windows,
        workers=1 + seed % 3,
        failure_rate=[0.02, 0.2][seed % 2],
    )
    engine = FakeEngine(Random(seed), config)
    events = engine.pick.choices(list(WEIGHTS), list(WEIGHTS.values()), k=20_000)
    for event in events:
        act(engine, event)
        engine.check()
    engine.drain()
    counters = engine.manager.counters
    assert engine.verified > 1000
    for event in ("urgent ins", "aborted copies", "lost", "still there", "no room", "saved"):
        assert engine.events[event], event
    assert min(counters.blocks_kept, counters.blocks_shared, counters.reclaimed_copies) > 0
