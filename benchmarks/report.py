"""Tables, plots and one page of points that were measured before.

    python -m benchmarks.report DIR [DIR...] [--out report/] [--baseline SYSTEM] [--target-ms MS]

Prints the tables of each folder. With `--out`, it also writes `report.md` with plots as PNG files
beside it, `index.html`, which is whole in itself, and `report.json`. Ratios are taken seed by seed,
then their median and range. The target of the sustained rate is ten decode steps of an idle engine
unless given.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from benchmarks.errors import InputError
from benchmarks.manifest import write_json
from benchmarks.plots import PLOTS
from benchmarks.result import RunResult
from benchmarks.store import load_points, manifest_of
from benchmarks.systems import BASELINE
from benchmarks.tables import (
    Table,
    output_check,
    output_verdict,
    summary,
    sustained_rates,
    tables_of,
    target_ms,
)

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """What one folder of points says."""

    name: str
    runs: list[RunResult]
    manifest: dict[str, Any]
    baseline: str
    target_ms: float | None
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def tables(self) -> list[Table]:
        """Tables with a ratio to the baseline in every cell."""
        return tables_of(self.runs, self.baseline, self.target_ms)

    @property
    def verdict(self) -> str:
        """Whether all systems generated the same."""
        return output_verdict(self.runs)

    @property
    def plots(self) -> list[dict[str, str]]:
        """Title and picture of each plot, as the page holds them."""
        return [
            {"title": PLOTS[name][0], "svg": _base64_svg(figure)}
            for name, figure in self.figures.items()
        ]

    @property
    def config(self) -> str:
        """What decided the numbers, as text."""
        return json.dumps(self.manifest["config"], indent=1)

    @property
    def facts(self) -> dict[str, str]:
        """How it was measured, in a few words."""
        config, machine = self.manifest["config"], self.manifest["machine"]
        lengths = config["trace"].get("built_in") or config["trace"].get("name")
        clock = "wall, over HTTP" if config.get("http") else config["clock"]
        seeds = sorted({run.seed for run in self.runs})
        return {
            "Lengths": str(lengths),
            "Requests": f"{config['requests']} a point, seeds {', '.join(map(str, seeds))}",
            "Clock": clock,
            "Batch": str(config["engine"]["max_num_seqs"]),
            "KV blocks": f"{config['engine']['num_gpu_blocks_override']}, "
            f"{config['kv_blocks_over_demand']:.2g} of what a full batch wants",
            "vLLM": self.manifest["versions"].get("vllm", "?"),
            "Commit": str(self.manifest["git"]["commit"]),
            "Machine": f"{machine['cpu_count']} x {machine['cpu']}",
        }

    def markdown(self) -> str:
        """The section's part of `report.md`."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts.items())
        plots = [f"![{PLOTS[plot][0]}]({self.file_of(plot)})" for plot in self.figures]
        tables = [table.markdown() for table in self.tables]
        return "\n\n".join([f"## {self.name}", facts, *plots, *tables, self.verdict])

    def document(self) -> dict[str, Any]:
        """The section's part of `report.json`."""
        target = self.target_ms or target_ms(self.runs)
        return {
            "manifest": self.manifest,
            "baseline": self.baseline,
            "target_normalized_ms": target,
            "sustained": sustained_rates(self.runs, target, self.baseline) if target else None,
            "output_check": output_check(self.runs),
            "summary": summary(self.runs, self.baseline),
        }

    def file_of(self, plot: str) -> str:
        """Name of a plot's PNG file."""
        return f"{self.name}-{plot}.png"


def section_of(folder: Path, baseline: str, target: float | None) -> Section:
    """Read a folder. Raises InputError for one without points that compare."""
    runs = load_points(folder)
    systems = sorted({run.system for run in runs})
    if baseline not in systems:
        raise InputError(
            f"no points of {baseline} in {folder}; there are points of {', '.join(systems)}"
        )
    return Section(folder.resolve().name, runs, manifest_of(folder), baseline, target)


def draw(section: Section) -> None:
    """Draw every plot that there are figures for."""
    for name, (_, plot) in PLOTS.items():
        figure = plot(section.runs)
        if figure is not None:
            section.figures[name] = figure


def write(sections: Sequence[Section], out: Path, baseline: str) -> None:
    """Write `report.md`, its plots, `index.html` and `report.json`."""
    out.mkdir(parents=True, exist_ok=True)
    for section in sections:
        draw(section)
        for name, figure in section.figures.items():
            figure.savefig(out / section.file_of(name), dpi=110)
    text = "\n\n".join(["# FastServe benchmarks", *(s.markdown() for s in sections)])
    (out / "report.md").write_text(text + "\n", encoding="utf-8")
    templates = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True)
    page = templates.get_template("report.html.j2").render(sections=sections, baseline=baseline)
    (out / "index.html").write_text(page, encoding="utf-8")
    write_json(out / "report.json", {section.name: section.document() for section in sections})


def _base64_svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--out", type=Path, help="folder for Markdown, plots, page and JSON")
    parser.add_argument("--baseline", default=BASELINE, help="system of the ratios' denominator")
    parser.add_argument("--target-ms", type=float, help="normalized latency to be sustained")
    args = parser.parse_args(argv)
    if len({folder.resolve().name for folder in args.folders}) < len(args.folders):
        parser.error("folders are told apart by their names, and two have the same")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for a folder without points that compare."""
    args = parse_arguments(argv)
    try:
        sections = [section_of(f, args.baseline, args.target_ms) for f in args.folders]
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    if args.out is not None:
        write(sections, args.out, args.baseline)
    for section in sections:
        if len(sections) > 1:
            print(f"\n## {section.name}\n")
        print("\n\n".join([*(table.markdown() for table in section.tables), section.verdict]))
    if args.out is not None:
        print(f"\nreport: {args.out / 'index.html'}, {args.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
