"""Predicts the seconds of an engine step from its shape, and learns from the steps that ran."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastserve_vllm.policy.shortest_step import ShortestStep

# Scales that bring the features near 1, so that one process noise suits all of them.
_SCALES = (1.0, 1e-3, 1e-1, 1e-4)
_NAMES = ("step_s", "prefill_token_s", "decode_s", "context_token_s")
# Until steps have been seen: the order of magnitude of an 8B model on one current GPU.
_PRIOR_COEFFICIENTS = (5e-3, 3e-5, 3e-5, 1e-8)
_PRIOR_SPREAD = 3.0
_DRIFT_STEPS = 20_000
_OUTLIER_SIGMAS = 4.0
_NOISE_MEMORY = 0.98
# Decode-only steps are alike and abundant: the model learns from one in this many of them.
_DECODE_SAMPLE = 4


class StepShape(NamedTuple):
    """What one engine step computes.

    Attributes:
        prefill_tokens: prompt tokens computed.
        decodes: requests that compute one token.
        context_tokens: tokens already in the KV cache of the requests that take part.
    """

    prefill_tokens: int = 0
    decodes: int = 0
    context_tokens: int = 0

    def features(self) -> tuple[float, float, float, float]:
        """The scaled regressors: 1, prefill tokens, decodes, context tokens."""
        return (
            _SCALES[0],
            self.prefill_tokens * _SCALES[1],
            self.decodes * _SCALES[2],
            self.context_tokens * _SCALES[3],
        )


class StepTimeModel:
    """Linear in (1, prefill tokens, decodes, context tokens); recursive least squares.

    The update is a Kalman filter whose state may drift slowly, so that directions which the
    workload does not excite keep a bounded uncertainty. An observation further than four noise
    deviations from the prediction is an outlier. Alone it counts for the noise only, so that one
    step of 100 times the usual moves no prediction; where they follow each other they count as if
    they were that far off, so that a lasting change of speed is learned in some dozen steps.

    Args:
        coefficients: seconds per step, prefill token, decode and context token to start from.
        base_quantum_s: the shortest decode step known; None until one is seen.
        pinned: ignore observations, so that runs can be reproduced.
    """

    def __init__(
        self,
        coefficients: Sequence[float] = _PRIOR_COEFFICIENTS,
        *,
        base_quantum_s: float | None = None,
        pinned: bool = False,
    ) -> None:
        if len(coefficients) != len(_NAMES) or not all(
            math.isfinite(c) and c >= 0 for c in coefficients
        ):
            raise ValueError(
                f"coefficients must be {len(_NAMES)} finite numbers of at least 0 "
                f"({', '.join(_NAMES)}), got {coefficients!r}"
            )
        self.pinned = pinned
        self._shortest_decode = ShortestStep(base_quantum_s)
        self.observations = 0
        self.outliers = 0
        # Changes whenever something that is predicted may have changed.
        self.revision = 0
        self._outlier_sides = [0, 0]
        self._theta = [c / s for c, s in zip(coefficients, _SCALES, strict=True)]
        self._prior = [(_PRIOR_SPREAD * max(t, 1e-6)) ** 2 for t in self._theta]
        self._drift = [p / _DRIFT_STEPS for p in self._prior]
        size = range(len(_NAMES))
        self._cov = [[self._prior[i] if i == j else 0.0 for j in size] for i in size]
        self._noise_s = self._theta[0]

    @property
    def min_decode_step_s(self) -> float | None:
        """The shortest decode step, in seconds, that others confirm; None until one was seen."""
        return self._shortest_decode.seconds

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Seconds per step, prefill token, decode and context token, none below 0."""
        return tuple(max(t, 0.0) * s for t, s in zip(self._theta, _SCALES, strict=True))

    @property
    def prefill_token_s(self) -> float:
        """Seconds that one more prefill token adds to a step."""
        return max(self._theta[1], 0.0) * _SCALES[1]

    def predict_s(self, shape: StepShape) -> float:
        """Seconds that a step of this shape takes; above 0."""
        t0, t1, t2, t3 = self._theta
        x0, x1, x2, x3 = shape.features()
        # Written out: a simulation asks this more often than anything else.
        total = (
            (t0 if t0 > 0.0 else 0.0) * x0
            + (t1 if t1 > 0.0 else 0.0) * x1
            + (t2 if t2 > 0.0 else 0.0) * x2
            + (t3 if t3 > 0.0 else 0.0) * x3
        )
        return total if total > 1e-6 else 1e-6

    def prefill_tokens_within(self, step_s: float) -> int:
        """Prompt tokens that a step of `step_s` seconds can compute beside nothing else."""
        per_token_s = self.prefill_token_s
        if not (math.isfinite(step_s) and per_token_s > 0.0):
            return 1 << 62
        return max(int((step_s - self.predict_s(StepShape())) / per_token_s), 0)

    def prefill_s(self, tokens: int, token_budget: int) -> float:
        """Seconds until the first token of a prompt that runs alone.

        Args:
            tokens: prompt tokens to compute, those in the prefix cache excluded.
            token_budget: tokens per step; a longer prompt is prefilled in chunks.
        """
        total_s, context = 0.0, 0
        while True:
            chunk = min(tokens - context, token_budget)
            total_s += self.predict_s(StepShape(prefill_tokens=chunk, context_tokens=context))
            context += chunk
            if context >= tokens:
                return total_s

    def observe(self, shape: StepShape, step_s: float) -> None:
        """Learn from a step that took `step_s` seconds; a non-positive time is ignored."""
        if self.pinned or not (math.isfinite(step_s) and step_s > 0):
            return
        self.observations += 1
        if shape.prefill_tokens == 0 and shape.decodes:
            shortest = self._shortest_decode.seconds
            self._shortest_decode.observe(step_s)
            self.revision += self._shortest_decode.seconds != shortest
            if self.observations > _DECODE_SAMPLE and self.observations % _DECODE_SAMPLE:
                return
        self._update(shape.features(), step_s)

    def _update(self, x: tuple[float, float, float, float], step_s: float) -> None:
        """One Kalman step; written out, for it runs in the engine's loop."""
        x0, x1, x2, x3 = x
        cov, theta = self._cov, self._theta
        for i, drift in enumerate(self._drift):
            row = cov[i]
            if row[i] < self._prior[i]:
                row[i] += drift
        gain = [r[0] * x0 + r[1] * x1 + r[2] * x2 + r[3] * x3 for r in cov]
        g0, g1, g2, g3 = gain
        residual = step_s - (theta[0] * x0 + theta[1] * x1 + theta[2] * x2 + theta[3] * x3)
        spread = g0 * x0 + g1 * x1 + g2 * x2 + g3 * x3
        noise = max(self._noise_s, 1e-3 * step_s, 1e-9)
        limit_s = _OUTLIER_SIGMAS * math.sqrt(noise * noise + spread)
        side = (residual > limit_s) - (residual < -limit_s)
        if side:
            residual = side * limit_s
        self._noise_s = _NOISE_MEMORY * self._noise_s + (1 - _NOISE_MEMORY) * abs(residual)
        if self._is_alone(side, prefills=x1 > 0):
            return
        self.revision += 1
        scale = 1.0 / (spread + noise * noise)
        for i, row in enumerate(cov):
            k = gain[i] * scale
            theta[i] += k * residual
            row[0] -= k * g0
            row[1] -= k * g1
            row[2] -= k * g2
            row[3] -= k * g3

    def _is_alone(self, side: int, *, prefills: bool) -> bool:
        """Whether the step is the first in a row, among those of its kind, to be this far off.

        Args:
            side: -1 or 1 for an outlier, 0 for any other step.
            prefills: the kind. A change that concerns prefills only shows in every step that has
                some, with ordinary steps in between.
        """
        alone = side != 0 and side != self._outlier_sides[prefills]
        self._outlier_sides[prefills] = side
        self.outliers += side != 0
        return alone

    def to_profile(self) -> dict[str, Any]:
        """The JSON-ready profile that `from_profile` accepts."""
        profile: dict[str, Any] = dict(zip(_NAMES, self.coefficients, strict=True))
        profile["base_quantum_s"] = self.min_decode_step_s
        return profile

    @classmethod
    def from_profile(cls, profile: Mapping[str, Any], *, pinned: bool = True) -> "StepTimeModel":
        """A model from a saved profile.

        Raises:
            ValueError: a key is missing or unknown, or a value is not a number in its range.
        """
        expected = {*_NAMES, "base_quantum_s"}
        if not isinstance(profile, Mapping) or set(profile) != expected:
            got = sorted(profile) if isinstance(profile, Mapping) else profile
            raise ValueError(f"a step-time profile has the keys {sorted(expected)}, got {got!r}")
        for name, value in profile.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        base = profile["base_quantum_s"]
        if base == 0:
            raise ValueError("base_quantum_s must be above 0, got 0")
        return cls([profile[n] for n in _NAMES], base_quantum_s=base, pinned=pinned)


def load_profile(path: str) -> StepTimeModel:
    """A pinned model from a JSON file.

    Raises:
        ValueError: the file cannot be read, is not JSON, or is not a profile.
    """
    try:
        with open(path, encoding="utf-8") as file:
            profile = json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"step_time_profile {path!r} cannot be read: {error}") from error
    return StepTimeModel.from_profile(profile)


def save_profile(model: StepTimeModel, path: str) -> None:
    """Write the model's profile as JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(model.to_profile(), file, indent=2)
        file.write("\n")
