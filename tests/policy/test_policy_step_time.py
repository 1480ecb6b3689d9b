"""The step-time model: what it learns, what it ignores, and its profile on disk."""

import json
import math
import random

import pytest

from fastserve_vllm.policy.step_time import StepShape, StepTimeModel, load_profile, save_profile

SMALL = (1.4e-3, 21e-6, 30e-6, 1e-9)
LARGE = (8e-3, 60e-6, 40e-6, 2e-8)
MACHINES = pytest.mark.parametrize("machine", [SMALL, LARGE], ids=["small", "large"])
PROFILE = {
    "step_s": 8e-3,
    "prefill_token_s": 6e-5,
    "decode_s": 4e-5,
    "context_token_s": 2e-8,
    "base_quantum_s": 9e-3,
}


def exact_s(machine, shape: StepShape) -> float:
    """What the step takes on a machine that is exactly linear."""
    step_s, prefill_s, decode_s, context_s = machine
    computed_s = prefill_s * shape.prefill_tokens + decode_s * shape.decodes
    return step_s + computed_s + context_s * shape.context_tokens


def shapes(seed: int, count: int, prefills: float = 0.5) -> list[StepShape]:
    """Steps of a mixed load; a share of them prefills."""
    dice = random.Random(seed)
    return [
        StepShape(
            prefill_tokens=dice.randint(1, 512) if dice.random() < prefills else 0,
            decodes=dice.randint(1, 16),
            context_tokens=dice.randint(0, 8000),
        )
        for _ in range(count)
    ]


def teach(model: StepTimeModel, machine, steps: list[StepShape], speed: float = 1.0) -> None:
    for shape in steps:
        model.observe(shape, exact_s(machine, shape) / speed)


def errors(model: StepTimeModel, machine, speed: float = 1.0) -> list[float]:
    """Relative errors over a mixed load that the model has not seen."""
    exact = [(shape, exact_s(machine, shape) / speed) for shape in shapes(999, 200)]
    return [abs(model.predict_s(shape) / step_s - 1) for shape, step_s in exact]


def learned(machine, steps: int = 400) -> StepTimeModel:
    model = StepTimeModel()
    teach(model, machine, shapes(1, steps))
    return model


class TestLearning:
    @MACHINES
    def test_a_linear_machine_is_learned(self, machine):
        """100 steps bring every prediction within 5 %."""
        assert max(errors(learned(machine, 100), machine)) < 0.05

    @MACHINES
    def test_noise_averages_out(self, machine):
        """With steps up to 10 % off, predictions stay within 15 %, most within 8 %."""
        model, dice = StepTimeModel(), random.Random(5)
        for shape in shapes(1, 1000):
            model.observe(shape, exact_s(machine, shape) * dice.uniform(0.9, 1.1))
        off = sorted(errors(model, machine))
        assert off[-1] < 0.15
        assert off[len(off) // 2] < 0.08

    @MACHINES
    @pytest.mark.parametrize("after", [100, 400, 2000])
    def test_one_slow_step_hardly_counts(self, machine, after):
        """A step of 100 times the usual moves no prediction by 5 %."""
        model = learned(machine, after)
        probes = shapes(999, 200)
        before = [model.predict_s(shape) for shape in probes]
        slow = StepShape(prefill_tokens=64, decodes=8, context_tokens=4000)
        model.observe(slow, 100 * exact_s(machine, slow))
        moved = [
            abs(model.predict_s(shape) / was - 1) for shape, was in zip(probes, before, strict=True)
        ]
        assert model.outliers > 0
        assert max(moved) < 0.05

    @MACHINES
    def test_slower_prefills_are_learned(self, machine):
        """Prefills that take twice as long are learned, though many decode steps lie between."""
        model = learned(machine)
        slower = (machine[0], 2 * machine[1], *machine[2:])
        teach(model, slower, shapes(2, 200, prefills=0.1))
        off = errors(model, slower)
        assert sum(off) / len(off) < 0.05

    @MACHINES
    @pytest.mark.parametrize("speed", [0.5, 2.0])
    def test_a_lasting_change_of_speed_is_learned(self, machine, speed):
        """100 steps at half or double speed bring predictions within 15 %, 5 % on average."""
        model = learned(machine)
        teach(model, machine, shapes(2, 100), speed)
        off = errors(model, machine, speed)
        assert max(off) < 0.15
        assert sum(off) / len(off) < 0.05

    def test_the_base_quantum_is_the_shortest_decode_step(self):
        """Only steps that decode and prefill nothing count for the base quantum."""
        model = StepTimeModel()
        for _ in range(6):
            for shape, step_s in [
                (StepShape(decodes=4), 0.03),
                (StepShape(decodes=1), 0.02),
                (StepShape(decodes=2), 0.04),
                (StepShape(prefill_tokens=1), 0.01),
                (StepShape(prefill_tokens=1, decodes=1), 0.01),
            ]:
                model.observe(shape, step_s)
        assert model.min_decode_step_s == 0.02

    @pytest.mark.parametrize("step_s", [math.nan, math.inf, -math.inf, 0.0, -1.0])
    def test_times_that_cannot_be_are_ignored(self, step_s):
        """A step time that is not finite and above 0 changes nothing."""
        model = learned(LARGE, 10)
        before = (model.coefficients, model.observations, model.min_decode_step_s)
        model.observe(StepShape(decodes=1), step_s)
        assert (model.coefficients, model.observations, model.min_decode_step_s) == before

    def test_a_pinned_model_does_not_learn(self):
        """A pinned model predicts the same forever."""
        model = StepTimeModel(LARGE, base_quantum_s=0.01, pinned=True)
        teach(model, SMALL, shapes(1, 50))
        assert model.coefficients == pytest.approx(LARGE)
        assert (model.observations, model.min_decode_step_s) == (0, 0.01)

    def test_predictions_are_above_zero(self):
        """Even of an empty step on a machine that costs nothing."""
        assert StepTimeModel([0.0] * 4).predict_s(StepShape()) > 0

    def test_predictions_do_not_go_below_zero_when_coefficients_would(self):
        """A machine on which more decodes seem to cost less gives no negative prediction."""
        model = StepTimeModel()
        for _ in range(200):
            model.observe(StepShape(decodes=1), 0.02)
            model.observe(StepShape(decodes=100), 0.01)
        assert min(model.coefficients) >= 0
        assert model.predict_s(StepShape(decodes=10_000)) > 0


class TestPrefill:
    def test_a_short_prompt_is_one_step(self):
        """A prompt within the token budget costs one step."""
        model = StepTimeModel(LARGE)
        assert model.prefill_s(512, 2048) == model.predict_s(StepShape(prefill_tokens=512))

    def test_a_long_prompt_is_prefilled_in_chunks(self):
        """Each chunk reads the context of those before."""
        model = StepTimeModel(LARGE)
        chunks = [StepShape(100, 0, 0), StepShape(100, 0, 100), StepShape(50, 0, 200)]
        assert model.prefill_s(250, 100) == pytest.approx(sum(map(model.predict_s, chunks)))

    def test_longer_prompts_take_longer(self):
        """Predictions rise with the prompt, so that join levels do."""
        model = learned(SMALL)
        times_s = [model.prefill_s(tokens, 512) for tokens in range(1, 3000, 37)]
        assert times_s == sorted(times_s)


class TestProfile:
    def test_a_saved_model_predicts_the_same(self, tmp_path):
        """Saving and loading keeps every prediction and pins the model."""
        model, path = learned(SMALL), str(tmp_path / "profile.json")
        save_profile(model, path)
        loaded = load_profile(path)
        assert loaded.pinned
        assert loaded.min_decode_step_s == model.min_decode_step_s
        for shape in shapes(3, 20):
            assert loaded.predict_s(shape) == pytest.approx(model.predict_s(shape))

    def test_a_profile_is_what_was_loaded(self):
        """`to_profile` gives back what `from_profile` took."""
        assert StepTimeModel.from_profile(PROFILE).to_profile() == pytest.approx(PROFILE)

    @pytest.mark.parametrize("name", PROFILE)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", None, True, [1.0]])
    def test_a_bad_value_is_named(self, name, value):
        """A value that is not a finite number of at least 0 raises, naming its key."""
        with pytest.raises(ValueError, match=f"^{name} must be"):
            StepTimeModel.from_profile({**PROFILE, name: value})

    def test_a_base_quantum_of_zero_is_refused(self):
        """The base quantum is above 0."""
        with pytest.raises(ValueError, match=r"^base_quantum_s must be above 0"):
            StepTimeModel.from_profile({**PROFILE, "base_quantum_s": 0})

    @pytest.mark.parametrize(
        "profile",
        [{k: PROFILE[k] for k in PROFILE if k != "decode_s"}, {**PROFILE, "gpu": 1}, {}, [1], 5],
    )
    def test_wrong_keys_are_refused(self, profile):
        """A profile has exactly its keys; the message lists them."""
        with pytest.raises(ValueError, match=r"has the keys .*'decode_s'.*, got"):
            StepTimeModel.from_profile(profile)

    @pytest.mark.parametrize(
        "coefficients", [(1.0,), (1.0, 1.0, 1.0, math.nan), (1.0, 1.0, 1.0, -1)]
    )
    def test_bad_coefficients_are_refused(self, coefficients):
        """A model needs four finite coefficients of at least 0."""
        with pytest.raises(ValueError, match="4 finite numbers of at least 0"):
            StepTimeModel(coefficients)

    @pytest.mark.parametrize("text", ["", "{", "nonsense"])
    def test_a_file_that_is_not_json_is_named(self, tmp_path, text):
        """A broken file raises, naming the path."""
        path = tmp_path / "profile.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"profile\.json"):
            load_profile(str(path))

    def test_a_missing_file_is_named(self, tmp_path):
        """A path that leads nowhere raises, naming it."""
        with pytest.raises(ValueError, match=r"nowhere\.json"):
            load_profile(str(tmp_path / "nowhere.json"))

    def test_a_profile_is_plain_json(self, tmp_path):
        """Another program can read and write a profile."""
        path = tmp_path / "profile.json"
        path.write_text(json.dumps(PROFILE))
        assert load_profile(str(path)).predict_s(StepShape()) == pytest.approx(8e-3)
