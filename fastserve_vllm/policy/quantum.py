"""The ladder of quanta of a multi-level feedback queue."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from operator import mul


@dataclass(frozen=True, slots=True)
class QuantumLadder:
    """Quanta in seconds, level 0 first; each is `ratio` times the one above, the last is endless.

    Raises:
        ValueError: a base that is not finite and positive, a ratio not above 1, no level.
    """

    base_s: float
    ratio: float = 2.0
    num_levels: int = 12
    quanta_s: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.base_s) and self.base_s > 0):
            raise ValueError(f"base_s must be finite and above 0, got {self.base_s}")
        if not (math.isfinite(self.ratio) and self.ratio > 1):
            raise ValueError(f"ratio must be finite and above 1, got {self.ratio}")
        if self.num_levels < 1:
            raise ValueError(f"num_levels must be at least 1, got {self.num_levels}")
        # Products, for they overflow to infinity where powers raise.
        quanta_s = list(
            accumulate(repeat(self.ratio, self.num_levels - 1), mul, initial=self.base_s)
        )
        object.__setattr__(self, "quanta_s", (*quanta_s[:-1], math.inf))

    @property
    def last_level(self) -> int:
        """Index of the lowest level."""
        return self.num_levels - 1

    def join_level(self, first_step_s: float) -> int:
        """The highest level whose quantum is at least `first_step_s` (skip-join, section 4.1)."""
        # Steps are whole: a prompt that costs exactly one quantum must not miss it by rounding.
        return bisect_left(self.quanta_s, first_step_s * (1 - 1e-9))

    def execute_s(self, level_sizes: Sequence[int], batch_size: int) -> Sequence[float]:
        """For each level, seconds until the jobs of higher ones have come down (section 4.2).

        (1/B) times the sum, over the jobs j of higher levels, of the quanta from j's level to the
        one above this. Jobs of the level itself count for nothing.

        Args:
            level_sizes: jobs of each level.
            batch_size: jobs that run at a time, B.
        """
        times, total_s, above = [], 0.0, 0
        for jobs, quantum_s in zip(level_sizes, self.quanta_s, strict=True):
            times.append(total_s)
            above += jobs
            if above:
                total_s += quantum_s * above / batch_size
        return times
