"""Targets that a fleet is to meet, and whether a run meets them."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fastserve_vllm.simulator.served import ServedRequest

METRICS: dict[str, Callable[[ServedRequest], float]] = {
    "ttft": lambda served: served.ttft_s,
    "tpot": lambda served: served.tpot_s if served.request.output_tokens > 1 else 0.0,
    "gap": lambda served: served.longest_gap_s,
    "e2e": lambda served: served.e2e_s,
    "normalized": lambda served: served.normalized_s,
}
"""Seconds of a request: to the first token, per output token after it, of the longest gap between
two tokens, end to end, and end to end per output token. An answer of one token has a gap of 0."""

_FORM = r"(?P<metric>[a-z0-9]+)_(?P<statistic>[a-z0-9.]+)=(?P<number>[^a-z]+)(?P<unit>[a-z]*)"
_UNITS = {"s": 1.0, "ms": 1e-3}
_EXAMPLE = "as in ttft_p95=0.5s"


class TargetError(ValueError):
    """A target that cannot be read; the message says what is accepted."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound of one figure.

    Attributes:
        text: as it was written.
        metric: a name in `METRICS`.
        share: of the requests that have to stay within the limit; None: their mean has to.
        limit_s: seconds.
    """

    text: str
    metric: str
    share: Fraction | None
    limit_s: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read `METRIC_STATISTIC=NUMBER UNIT`.

        Raises:
            TargetError: naming the part that is wrong, and what it accepts.
        """
        match = re.fullmatch(_FORM, text.strip())
        if match is None:
            raise TargetError(
                f"target {text!r}: expected METRIC_STATISTIC=NUMBER and a unit, {_EXAMPLE}; "
                f"metrics are {', '.join(METRICS)}, statistics mean, max and p1 to p99.99, units "
                "s and ms"
            )
        metric, unit = match["metric"], match["unit"]
        if metric not in METRICS:
            raise TargetError(
                f"target {text!r}: metric must be one of {', '.join(METRICS)}, got {metric!r}"
            )
        if unit not in _UNITS:
            raise TargetError(
                f"target {text!r}: unit must be one of {', '.join(_UNITS)}, got {unit!r}"
            )
        share = _share(text, match["statistic"])
        return cls(text.strip(), metric, share, _UNITS[unit] * _limit(text, match["number"]))

    def allowed(self, requests: int) -> int:
        """Of so many requests, how many may exceed the limit; there must be a share."""
        return math.floor(requests * (1 - (self.share or 0)))


def _share(text: str, statistic: str) -> Fraction | None:
    if statistic == "mean":
        return None
    if statistic == "max":
        return Fraction(1)
    if re.fullmatch(r"p\d+(\.\d+)?", statistic):
        percent = Fraction(statistic[1:])
        if 0 < percent < 100:
            return percent / 100
    raise TargetError(
        f"target {text!r}: statistic must be mean, max, or p and a number between 0 and 100, as in "
        f"p95, got {statistic!r}"
    )


def _limit(text: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise TargetError(f"target {text!r}: the limit must be a number above 0, got {number!r}")
    return value


class Score:
    """How a run does on a target.

    Counted, not estimated: a percentile is within a limit if enough requests are.

    Args:
        target: what is to be met.
        requests: how many the run has.
    """

    def __init__(self, target: Target, requests: int) -> None:
        self.target = target
        self._seconds = METRICS[target.metric]
        self._requests = requests
        self._over = 0
        self._sum_s = 0.0
        self._taken = 0

    def take(self, served: ServedRequest) -> None:
        """A request has finished."""
        seconds = self._seconds(served)
        self._taken += 1
        self._sum_s += seconds
        self._over += seconds > self.target.limit_s

    @property
    def missed(self) -> bool:
        """Whether the target is missed for certain, whatever the requests to come are like."""
        if self.target.share is None:
            return self._sum_s > self.target.limit_s * self._requests
        return self._over > self.target.allowed(self._requests)

    @property
    def reached(self) -> float:
        """So far: the mean in seconds, or the share of the requests within the limit."""
        if not self._taken:
            return math.nan
        if self.target.share is None:
            return self._sum_s / self._taken
        return 1 - self._over / self._taken


class Scorecard:
    """How a run does on all of its targets.

    Args:
        targets: what is to be met.
        requests: how many the run has.
    """

    def __init__(self, targets: Sequence[Target], requests: int) -> None:
        self.scores = [Score(target, requests) for target in targets]

    def take(self, served: ServedRequest) -> None:
        """A request has finished."""
        for score in self.scores:
            score.take(served)

    @property
    def missed(self) -> list[Target]:
        """Targets that are missed for certain; at the end of a run, those that are not met."""
        return [score.target for score in self.scores if score.missed]
