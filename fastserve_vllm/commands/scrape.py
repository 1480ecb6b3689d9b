"""Readings of a server's `/metrics`."""

import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from fastserve_vllm.metrics import BY_NAME

_PREFIX = "vllm:fastserve_"


class NotServedError(RuntimeError):
    """The server does not answer, or shows no figures of FastServe's."""


@dataclass(frozen=True)
class Sample:
    """One series."""

    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class Reading:
    """All of FastServe's series at one time, by the name that `/metrics` shows."""

    at_s: float
    series: dict[str, list[Sample]] = field(default_factory=dict)

    def total(self, name: str, suffix: str = "", **where: str) -> float:
        """Sum of the series of a catalogue metric whose labels are as given."""
        return sum(
            sample.value
            for sample in self.series.get(BY_NAME[name].sample_name + suffix, ())
            if where.items() <= sample.labels.items()
        )

    def by(self, name: str, label: str) -> dict[str, float]:
        """Sums over engines, or the largest of seconds, by the value of a label."""
        merged: dict[str, float] = {}
        largest = BY_NAME[name].unit == "seconds"
        for sample in self.series.get(BY_NAME[name].sample_name, ()):
            key = sample.labels[label]
            before = merged.get(key, 0.0)
            merged[key] = max(before, sample.value) if largest else before + sample.value
        return merged

    def labels(self, label: str) -> list[str]:
        """The values of a label of vLLM's."""
        return sorted({sample.labels[label] for sample in self.series[BY_NAME["jobs"].sample_name]})


@dataclass(frozen=True)
class Change:
    """What happened between two readings."""

    before: Reading
    now: Reading

    def rate(self, name: str, suffix: str = "", **where: str) -> float:
        """Increase a second; 0 for a server that was started anew."""
        passed_s = self.now.at_s - self.before.at_s
        grown = self.now.total(name, suffix, **where) - self.before.total(name, suffix, **where)
        return max(grown, 0.0) / passed_s if passed_s > 0 else 0.0

    def share(self, part: float, whole: float) -> float | None:
        """A part of a whole; None: there is no whole."""
        return part / whole if whole > 0 else None


def read(url: str, timeout_s: float = 5.0) -> Reading:
    """Read a server's figures.

    Raises:
        NotServedError: it does not answer, or runs without FastServe.
    """
    address = url.rstrip("/") + "/metrics"
    if not address.startswith(("http://", "https://")):
        raise NotServedError(f"{url} is not an http address")
    try:
        with urllib.request.urlopen(address, timeout=timeout_s) as response:  # noqa: S310
            text = response.read().decode()
    except OSError as error:
        raise NotServedError(f"{address} does not answer: {error}") from None
    reading = parse(text, time.monotonic())
    if not reading.series.get(BY_NAME["jobs"].sample_name):
        raise NotServedError(
            f"{address} shows nothing of FastServe's: was anything served with it yet?"
        )
    return reading


def parse(text: str, at_s: float) -> Reading:
    """A reading from the text of an exposition."""
    reading = Reading(at_s)
    for name, sample in _samples(text):
        reading.series.setdefault(name, []).append(sample)
    return reading


def _samples(text: str) -> Iterator[tuple[str, Sample]]:
    for family in text_string_to_metric_families(text):
        if family.name.startswith(_PREFIX):
            for sample in family.samples:
                yield sample.name, Sample(sample.labels, sample.value)
