"""StepTimer: steps are charged at once, and learned from some steps late."""

from types import SimpleNamespace

import pytest

from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.step_timer import StepTimer


class Steps:
    """Ends steps of one decode, 2 ms each."""

    def __init__(self, **config):
        self.timer = StepTimer(FastServeConfig.parse(config))
        self.noted = []
        self.timer.note = self.noted.append
        self.now_s = 0.0

    def end(self, count):
        for _ in range(count):
            self.timer.scheduled(self.now_s)
            self.now_s += 0.002
            cached = SimpleNamespace(num_computed_tokens=[7])
            output = SimpleNamespace(
                total_num_scheduled_tokens=1,
                num_scheduled_tokens={"a": 1},
                scheduled_cached_reqs=cached,
            )
            self.timer.ended(output, self.now_s)


@pytest.fixture
def steps():
    return Steps()


def test_the_first_steps_are_learned_from_at_once(steps):
    """All predictions hang on them."""
    for count in range(1, 65):
        steps.end(1)
        assert steps.timer.step_time.observations == len(steps.noted) == count


def test_later_ones_wait_for_fifteen_others(steps):
    steps.end(64)
    steps.end(15)
    assert steps.timer.step_time.observations == len(steps.noted) == 64
    steps.end(1)
    assert steps.timer.step_time.observations == len(steps.noted) == 80


def test_they_are_charged_at_once(steps):
    steps.end(64)
    steps.timer.take_s()
    steps.end(3)
    assert steps.timer.take_s() == pytest.approx(0.006)
    assert steps.timer.take_s() == 0.0


def test_what_is_noted_was_predicted_before_it_was_learned_from(steps):
    """Whoever notes the steps changes nothing about what is learned."""
    silent = Steps()
    silent.timer.note = None
    steps.end(100)
    silent.end(100)
    silent.timer.learn()
    steps.timer.learn()
    assert len(steps.noted) == 100
    assert steps.noted[0].predicted_s != pytest.approx(0.002)
    assert steps.noted[-1].predicted_s == pytest.approx(0.002, rel=0.1)
    assert silent.timer.step_time.to_profile() == steps.timer.step_time.to_profile()


def test_a_saved_profile_holds_all_steps(tmp_path):
    steps = Steps(save_step_time_profile=str(tmp_path / "profile.json"))
    steps.end(70)
    steps.timer.save(steps.now_s)
    assert steps.timer.step_time.observations == 70
    assert (tmp_path / "profile.json").exists()
