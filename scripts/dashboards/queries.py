"""PromQL over the metric catalogue: what it does not know, a name or a label, raises."""

from __future__ import annotations

from fastserve_vllm.metrics import BY_NAME, Kind, Metric

ENGINE_LABELS = ("model_name", "engine")
SELECTOR = 'model_name=~"$model_name",engine=~"$engine"'
INTERVAL = "$__rate_interval"


def metric(name: str, *kinds: Kind) -> Metric:
    """The catalogue's entry; raises where it has none, or one of another kind."""
    found = BY_NAME[name]
    if kinds and found.kind not in kinds:
        raise ValueError(f"{name} is a {found.kind.value}")
    return found


def samples(found: Metric, suffix: str = "", where: str = "", selector: str = SELECTOR) -> str:
    """A metric's samples of the selected engines."""
    matchers = ",".join(part for part in (selector, where) if part)
    return f"{found.sample_name}{suffix}" + (f"{{{matchers}}}" if matchers else "")


def value(name: str, *by: str, where: str = "", merge: str = "sum") -> str:
    """A gauge of all engines together."""
    found = metric(name, Kind.GAUGE)
    return f"{_merged(found, by, merge)}({samples(found, where=where)})"


def rate(name: str, *by: str, where: str = "", suffix: str = "") -> str:
    """Increase a second: of a counter, or of a histogram's `_sum` or `_count`."""
    found = metric(name, Kind.HISTOGRAM if suffix else Kind.COUNTER)
    return f"{_merged(found, by, 'sum')}(rate({samples(found, suffix, where)}[{INTERVAL}]))"


def quantile(share: float, name: str, *by: str) -> str:
    """A quantile of a histogram."""
    found = metric(name, Kind.HISTOGRAM)
    _check(found, by)
    rates = f"rate({samples(found, '_bucket')}[{INTERVAL}])"
    return f"histogram_quantile({share}, sum by ({', '.join(('le', *by))}) ({rates}))"


def _merged(found: Metric, by: tuple[str, ...], merge: str) -> str:
    _check(found, by)
    return f"{merge} by ({', '.join(by)}) " if by else merge


def _check(found: Metric, by: tuple[str, ...]) -> None:
    unknown = set(by) - set(found.label_names) - set(ENGINE_LABELS)
    if unknown:
        raise ValueError(f"{found.name} has no label {', '.join(sorted(unknown))}")
