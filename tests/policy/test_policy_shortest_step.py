"""The shortest step: what a machine really takes, whatever single steps seem to have taken."""

import random

import pytest

from fastserve_vllm.policy.shortest_step import ShortestStep
from fastserve_vllm.policy.step_time import StepShape, StepTimeModel

STEP_S = 0.02


def shortest(times_s, known_s=None):
    found = ShortestStep(known_s)
    for step_s in times_s:
        found.observe(step_s)
    return found.seconds


def test_nothing_is_known_at_first():
    """None until a step was seen, unless it is given."""
    assert shortest([]) is None
    assert shortest([], known_s=STEP_S) == STEP_S


def test_the_first_step_counts_at_once():
    """A machine far from the prior is known after its first step."""
    assert shortest([STEP_S]) == STEP_S


@pytest.mark.parametrize("position", [1, 2, 5, 11, 40, 63, 64, 500, 999])
@pytest.mark.parametrize("wrong_s", [1e-9, 1e-5, STEP_S / 100])
def test_one_wrong_step_changes_nothing(position, wrong_s):
    """A step that seems to take next to nothing leaves the shortest as it is, at any time."""
    times_s = [STEP_S] * 1000
    times_s[position] = wrong_s
    assert shortest(times_s[: position + 1]) == STEP_S
    assert shortest(times_s) == STEP_S


def test_one_wrong_step_in_a_hundred_changes_nothing():
    """Neither do they if they keep coming: a process that is held up often."""
    dice = random.Random(1)
    times_s = [1e-6 if dice.random() < 0.01 else STEP_S for _ in range(100_000)]
    assert shortest(times_s) == STEP_S


def test_a_wrong_first_step_is_forgotten():
    """Even the very first time may be wrong."""
    assert shortest([1e-9] + [STEP_S] * 2) == STEP_S


def test_a_faster_machine_is_believed():
    """Steps that are shorter from now on count after two blocks at most."""
    assert shortest([STEP_S] * 640 + [STEP_S / 3] * 128) == STEP_S / 3


def test_load_does_not_lengthen_it():
    """Longer steps, as big batches take, leave the shortest as it was."""
    assert shortest([STEP_S] * 64 + [10 * STEP_S] * 10_000) == STEP_S


def test_a_known_shortest_step_needs_a_whole_block_to_shrink():
    """What a profile says is not given up for a few shorter times."""
    assert shortest([STEP_S / 2] * 63, known_s=STEP_S) == STEP_S
    assert shortest([STEP_S / 2] * 64, known_s=STEP_S) == STEP_S / 2


@pytest.mark.parametrize("factor", [1e-6, 0.01, 100, 1e4])
def test_a_wrong_step_poisons_neither_prediction_nor_quantum(factor):
    """A step of a hundred times the usual, or of next to nothing: the model stays as it was."""
    model = StepTimeModel()
    for number in range(400):
        shape = StepShape(decodes=1 + number % 8, context_tokens=100 * (number % 7))
        model.observe(shape, STEP_S + 1e-4 * shape.decodes)
    shape = StepShape(decodes=4, context_tokens=300)
    predicted_s, quantum_s = model.predict_s(shape), model.min_decode_step_s
    model.observe(shape, factor * STEP_S)
    assert model.predict_s(shape) == pytest.approx(predicted_s, rel=0.02)
    assert model.min_decode_step_s == quantum_s
