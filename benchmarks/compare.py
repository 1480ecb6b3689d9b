"""Tables of points that were measured before.

    python -m benchmarks.compare FOLDER [--baseline SYSTEM] [--target-ms MS] [--json FILE]

Ratios are taken seed by seed, then their median and range. The target of the sustained rate is ten
decode steps of an idle engine unless given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.errors import InputError
from benchmarks.manifest import write_json
from benchmarks.report import RunResult, output_check, report, summary, sustained_rates, target_ms
from benchmarks.store import load_points, manifest_of
from benchmarks.systems import BASELINE


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", default=BASELINE, help="system of the ratios' denominator")
    parser.add_argument("--target-ms", type=float, help="normalized latency to be sustained")
    parser.add_argument("--json", type=Path, help="file for the same figures")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; 2 for a folder without points that compare."""
    args = parse_arguments(argv)
    try:
        runs = load_points(args.folder)
        _check_baseline(runs, args.baseline)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(report(runs, args.baseline, args.target_ms))
    if args.json is not None:
        target = args.target_ms or target_ms(runs)
        document = {
            "manifest": manifest_of(args.folder),
            "baseline": args.baseline,
            "target_normalized_ms": target,
            "sustained": sustained_rates(runs, target, args.baseline) if target else None,
            "output_check": output_check(runs),
            "summary": summary(runs, args.baseline),
        }
        write_json(args.json, document)
    return 0


def _check_baseline(runs: Sequence[RunResult], baseline: str) -> None:
    systems = sorted({run.system for run in runs})
    if baseline not in systems:
        raise InputError(f"no points of {baseline}; there are points of {', '.join(systems)}")


if __name__ == "__main__":
    sys.exit(main())
