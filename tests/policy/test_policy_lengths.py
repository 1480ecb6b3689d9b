"""What answers' lengths are learned from, and how far that is believed."""

import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_vllm.policy.lengths import AnswerLengths

answers = st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-3, 100.0)), min_size=1, max_size=80)


def learned(pairs) -> AnswerLengths:
    """What these answers taught."""
    lengths = AnswerLengths()
    for prompt_tokens, service_s in pairs:
        lengths.learn(prompt_tokens, service_s)
    return lengths


def weighted(pairs) -> tuple[float, dict[int, float]]:
    """Share explained, and what each class takes beyond the mean: with arrays, from the books."""
    classes = np.array([math.floor(2 * math.log2(prompt) + 0.5) for prompt, _ in pairs])
    service = np.array([service_s for _, service_s in pairs])
    weights = 0.995 ** np.arange(len(pairs))[::-1]
    mean = np.average(service, weights=weights)
    total = float(np.sum(weights * (service - mean) ** 2))
    within, beyond = 0.0, {}
    for name in set(classes.tolist()):
        here = classes == name
        class_mean = np.average(service[here], weights=weights[here])
        within += float(np.sum(weights[here] * (service[here] - class_mean) ** 2))
        size = weights[here].sum()
        beyond[name] = float((class_mean - mean) * size / (size + 4))
    n, k = weights.sum(), len(beyond)
    if n <= k or total <= 1e-9 * float(np.sum(weights * service**2)):
        return 0.0, beyond
    adjusted = 1 - (within / (n - k)) / (total / (n - 1))
    return max(adjusted - math.sqrt(2 * (k - 1)) / (n - k), 0.0), beyond


@given(answers)
def test_it_is_the_adjusted_coefficient_of_determination(pairs):
    """As computed from all answers at once; the class mean is drawn towards that of all."""
    lengths = learned(pairs)
    explained, beyond = weighted(pairs)
    assert lengths.explained == pytest.approx(explained, abs=1e-6)
    assert 0 <= lengths.explained <= 1
    for prompt_tokens, _ in pairs:
        expected_s = lengths.explained * beyond[math.floor(2 * math.log2(prompt_tokens) + 0.5)]
        assert lengths.longer_s(prompt_tokens) == pytest.approx(expected_s, abs=1e-6)


def test_prompts_that_tell_are_believed():
    """Long prompts that want short answers: nearly all is explained, and the sign is right."""
    dice = random.Random(0)
    pairs = [(2000, dice.gauss(1.0, 0.1)) for _ in range(60)]
    pairs += [(100, dice.gauss(4.0, 0.1)) for _ in range(60)]
    dice.shuffle(pairs)
    lengths = learned(pairs)
    assert lengths.explained > 0.95
    assert lengths.longer_s(2000) == pytest.approx(-1.5, abs=0.2)
    assert lengths.longer_s(95) == pytest.approx(1.5, abs=0.2)


def test_prompts_that_do_not_tell_are_not():
    """Whatever chance makes of it: over seeds, next to nothing is believed."""
    believed = []
    for seed in range(40):
        dice = random.Random(seed)
        prompts = [round(2 ** dice.uniform(0, 11)) for _ in range(200)]
        believed.append(learned((p, dice.expovariate(1.0)) for p in prompts).explained)
    assert statistics.median(believed) == 0
    assert statistics.mean(believed) < 0.03


def test_the_unknown_is_as_long_as_any():
    """Before anything has ended, for a class never seen, and after one answer."""
    assert AnswerLengths().longer_s(7) == 0
    lengths = learned([(10, 1.0)])
    assert (lengths.explained, lengths.longer_s(10)) == (0, 0)
    lengths = learned([(10, 1.0), (1000, 5.0)] * 20)
    assert lengths.longer_s(100) == 0
    assert lengths.longer_s(10) < 0 < lengths.longer_s(1000)


def test_answers_all_alike_explain_nothing():
    """There is no variance to divide by."""
    lengths = learned([(10, 0.1), (1000, 0.1)] * 30)
    assert (lengths.explained, lengths.longer_s(10)) == (0, 0)


def test_what_was_given_up_while_it_waited_tells_nothing():
    """Nothing is forgotten for it either."""
    lengths = learned([(10, 1.0), (1000, 5.0)] * 20)
    before = lengths.longer_s(1000)
    lengths.end(1000, 0.0, running=False)
    assert lengths.longer_s(1000) == before
    lengths.end(1000, 9.0, running=False)
    assert lengths.longer_s(1000) != before


def test_the_last_steps_of_an_answer_count():
    """One that ran when it ended is charged the steps that end with it, and then it is learned."""
    lengths, at_once = AnswerLengths(), learned([(10, 1.0), (1000, 5.0)] * 20)
    for _ in range(20):
        lengths.end(10, 0.5, running=True)
        lengths.charge(0.5)
        lengths.end(1000, 4.0, running=True)
        lengths.charge(1.0)
    assert lengths.longer_s(10) == at_once.longer_s(10)
    lengths.charge(7.0)
    assert lengths.longer_s(10) == at_once.longer_s(10)


def test_it_follows_a_change():
    """After some hundred answers the other way round, so is what is expected."""
    lengths = learned([(10, 1.0), (1000, 5.0)] * 100)
    for _ in range(300):
        lengths.learn(10, 5.0)
        lengths.learn(1000, 1.0)
    assert lengths.longer_s(1000) < 0 < lengths.longer_s(10)


def test_a_class_that_no_more_answers_come_from_is_forgotten():
    """It does not count among the classes, and is as long as any again."""
    lengths = learned([(10, 1.0), (1000, 5.0)] * 20)
    for number in range(1200):
        lengths.learn(100 if number % 2 else 200, 1.0 + number % 2)
    assert lengths.longer_s(10) == lengths.longer_s(1000) == 0
    assert lengths.longer_s(200) < 0 < lengths.longer_s(100)
