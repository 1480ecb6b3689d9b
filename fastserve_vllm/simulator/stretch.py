"""Steps that are taken at once, since nothing happens between them."""

import math
from dataclasses import dataclass

from fastserve_vllm.policy.job import Job
from fastserve_vllm.policy.step_time import StepShape


@dataclass(slots=True)
class Stretch:
    """One step, or several with the same batch, each a little longer than the one before.

    Attributes:
        batch, counts: who runs, and the tokens that each computes in the first step.
        shape: of the first step.
        wait_s: seconds that it waits for copies.
        begun_s: when it begins to compute.
        first_s: seconds that it computes.
        growth_s: by how much each step is longer than the one before.
        steps: how many there are.
    """

    batch: tuple[Job, ...]
    counts: list[int]
    shape: StepShape
    wait_s: float
    begun_s: float
    first_s: float
    growth_s: float = 0.0
    steps: int = 1

    @property
    def total_s(self) -> float:
        """Seconds that all steps compute."""
        steps = self.steps
        return steps * self.first_s + self.growth_s * (steps * (steps - 1) // 2)

    @property
    def ends_s(self) -> float:
        """When the last step ends."""
        return self.begun_s + self.total_s

    def cut(self, arrival_s: float) -> bool:
        """Let it end with the step in which somebody arrives; returns whether that is sooner."""
        if self.steps == 1:
            return False
        steps = self.steps_within(arrival_s - self.begun_s)
        if steps >= self.steps:
            return False
        self.steps = int(steps)
        return True

    def steps_within(self, seconds: float) -> float:
        """The fewest steps that take at least `seconds`, at least 1."""
        if seconds <= self.first_s:
            return 1
        if not math.isfinite(seconds):
            return math.inf
        if self.growth_s > 0:
            half = self.first_s - self.growth_s / 2
            root = math.sqrt(half * half + 2 * self.growth_s * seconds)
            steps = (root - half) / self.growth_s
        else:
            steps = seconds / self.first_s
        return max(math.ceil(steps - 1e-9), 1)
