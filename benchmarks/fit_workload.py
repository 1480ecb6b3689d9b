"""Fit a built-in workload to a trace, and say how well it fits.

    python -m benchmarks.fit_workload --trace sharegpt.csv [--json FILE]

Prints the parameters as `fastserve_vllm.workloads` holds them, and the error of 200,000 lengths
drawn from them: Kolmogorov-Smirnov distance, mean and percentiles of both lengths, their rank
correlation, and the mean output of short, middling and long prompts, which the correlation alone
does not fix.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from benchmarks.errors import InputError
from benchmarks.manifest import fingerprint, manifest, write_json
from benchmarks.workload import load_trace, paper_filter
from fastserve_vllm.workloads import KNOT_SHARES, WORKLOADS, Workload

DRAWS = 200_000
PERCENTILES = (50, 90, 99)
_CLASSES = 5

Lengths = NDArray[np.int64]


def fitted(lengths: Lengths) -> Workload:
    """The workload of which a trace's (prompt, output) rows could be draws."""
    prompts, outputs = (_knots(lengths[:, column]) for column in (0, 1))
    # Pearson's relation between the rank correlation and that of two normal variables.
    correlation = 2 * math.sin(math.pi / 6 * rank_correlation(lengths))
    return Workload(prompts, outputs, round(correlation, 3))


def _knots(tokens: Lengths) -> tuple[float, ...]:
    """Tokens at the knots' shares. A count of k is spread over k - 0.5 to k + 0.5: draws round."""
    values, counts = np.unique(tokens, return_counts=True)
    shares = np.cumsum(counts) / len(tokens)
    edges = np.concatenate(([values[0] - 0.49], values + 0.49))
    found = np.interp(KNOT_SHARES, np.concatenate(([0.0], shares)), edges)
    return tuple(float(f"{tokens:.4g}") for tokens in found)


def drawn(workload: Workload, seed: int = 0) -> Lengths:
    """Lengths from a workload, one request a row."""
    return np.array(list(itertools.islice(workload.lengths(seed), DRAWS)))


def rank_correlation(lengths: Lengths) -> float:
    """Spearman's, with mean ranks for ties."""
    ranks = [_ranks(lengths[:, column]) for column in (0, 1)]
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: Lengths) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def ks_distance(a: Lengths, b: Lengths) -> float:
    """The largest difference of two samples' distribution functions."""
    at = np.union1d(a, b)
    shares = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def errors(trace: Lengths, workload: Workload) -> list[dict[str, Any]]:
    """One row a figure: the trace's, the workload's, and the difference in percent."""
    draws = drawn(workload)
    rows = []
    for column, name in enumerate(("prompt", "output")):
        real, made = trace[:, column], draws[:, column]
        rows += [
            _row(f"{name} KS distance", None, ks_distance(real, made)),
            _row(f"{name} mean", real.mean(), made.mean()),
            *(
                _row(
                    f"{name} P{percent}", np.percentile(real, percent), np.percentile(made, percent)
                )
                for percent in PERCENTILES
            ),
        ]
    rows.append(_row("rank correlation", rank_correlation(trace), rank_correlation(draws)))
    return rows + _errors_by_prompt(trace, draws)


def _errors_by_prompt(trace: Lengths, draws: Lengths) -> list[dict[str, Any]]:
    """The mean output of each fifth of the requests, by their prompts."""
    rows = []
    bounds = np.quantile(trace[:, 0], np.linspace(0, 1, _CLASSES + 1))
    for low, high in itertools.pairwise(bounds):
        means = [x[(x[:, 0] >= low) & (x[:, 0] <= high), 1].mean() for x in (trace, draws)]
        rows.append(_row(f"mean output at prompts {low:.0f}-{high:.0f}", *means))
    return rows


def _row(figure: str, real: float | None, made: float) -> dict[str, Any]:
    row: dict[str, Any] = {"figure": figure, "trace": real, "workload": made, "error %": None}
    if real is not None and "correlation" not in figure:
        row["error %"] = 100 * (made / real - 1)
    return row


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_workload")
    parser.add_argument("--trace", type=Path, required=True, help="CSV of request lengths")
    parser.add_argument(
        "--check", choices=WORKLOADS, help="state a built-in workload's error instead of fitting"
    )
    parser.add_argument("--json", type=Path, help="file for the same figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print parameters and error; 2 for a trace that cannot be read."""
    args = parse_arguments(argv)
    try:
        rows = paper_filter(load_trace(args.trace))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    trace = np.array([(row.prompt_tokens, row.output_tokens) for row in rows])
    workload = WORKLOADS[args.check] if args.check else fitted(trace)
    print(f"prompt_knots={workload.prompt_knots}")
    print(f"output_knots={workload.output_knots}")
    print(f"correlation={workload.correlation}\n")
    table = errors(trace, workload)
    print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".4g"))
    if args.json is not None:
        config = {"trace": fingerprint(args.trace), "requests": len(trace)}
        write_json(args.json, {"manifest": manifest(config), "errors": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
