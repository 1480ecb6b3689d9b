"""One of the paper's figures, measured here.

    python -m benchmarks.figures 11 --out DIR [--seeds 0 1 2] [--requests N] [--jobs 2]

For each system, the arrival rate at which the figure's latency passes its limit is looked for:
loads 1.0 and 1.2 of stock vLLM's capacity first, which all systems share, then upwards or downwards
and in between; the logarithm of the latency is interpolated. Prints a table with the paper's ratio
beside ours and the critics' figures in the same rows, and writes it with a plot to DIR. Points are
kept in DIR: what is there already is not measured again, and figures 11, 12 and 13 share theirs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cli import count
from benchmarks.errors import InputError
from benchmarks.figures.catalogue import FIGURES
from benchmarks.figures.measure import measure
from benchmarks.figures.show import plot, ratios, table
from benchmarks.manifest import manifest, write_json


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        epilog="; ".join(f"{number}: {figure.title}" for number, figure in FIGURES.items()),
    )
    parser.add_argument("figure", type=int, choices=FIGURES)
    parser.add_argument("--out", type=Path, required=True, help="folder of points and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--requests", type=count, help="of a point (default: the figure's)")
    parser.add_argument("--jobs", type=count, default=2, help="points at the same time")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for bad input."""
    args = parse_arguments(argv)
    figure = FIGURES[args.figure]
    try:
        settings = [measure(setting, figure, args) for setting in figure.settings]
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    text = (
        f"# Figure {args.figure}: {figure.title}\n\n{figure.note}\n\n{table(settings).markdown()}"
    )
    print(text)
    name = f"figure{args.figure}"
    (args.out / f"{name}.md").write_text(f"{text}\n\n![plot]({name}.png)\n", encoding="utf-8")
    plot(settings).savefig(args.out / f"{name}.png", dpi=110)
    config = {"figure": args.figure, "seeds": args.seeds, "requests": args.requests}
    rows = [
        {
            "setting": measured.setting.name,
            "goal": measured.setting.goal.title,
            "system": system,
            "rates_rps": [measured.rates[system, seed] for seed in args.seeds],
            "fastserve_over_it": ratios(measured, system),
            "paper": measured.setting.paper.get(system),
        }
        for measured in settings
        for system in measured.setting.systems
    ]
    write_json(args.out / f"{name}.json", {"manifest": manifest(config), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
