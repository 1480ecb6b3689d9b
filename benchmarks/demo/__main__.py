"""The same burst of requests over HTTP on stock vLLM and on FastServe: a table and a plot.

    python -m benchmarks.demo [--model DIR] [--out DIR]          or: make demo

Some users ask for long stories; moments later others ask short questions, while every place of the
batch is taken. Stock vLLM answers them when stories have ended, FastServe at once. Both servers get
the same requests at the same moments and generate the same number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import plotext
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.demo.burst import KINDS, Ask, burst, warm_up
from benchmarks.demo.client import Answer, send
from benchmarks.demo.plot import picture
from benchmarks.engine import EngineShape
from benchmarks.errors import InputError
from benchmarks.http_server import serving
from benchmarks.model import model_folder
from benchmarks.systems import BASELINE, System, system_named

# By name, and what a newcomer calls them.
SYSTEMS = {BASELINE: "stock vLLM", "fastserve": "FastServe"}
BATCH = 8


def shape_of(model: Path) -> EngineShape:
    """An engine whose batch has few places and whose KV cache holds the whole burst."""
    return EngineShape(
        model,
        batch=BATCH,
        kv_blocks=400,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 29,
        further={"dtype": "auto"},
    )


def serve_burst(
    system: System, shape: EngineShape, asks: Sequence[Ask], log: Path, progress: Progress
) -> list[Answer]:
    """Start a server, warm it up, send the burst, and show its progress."""
    title = SYSTEMS[system.name]
    starting = progress.add_task(f"{title}: starting", total=None)
    with serving(shape, system, log) as server:
        asyncio.run(send(server.base_url, warm_up(BATCH)))
        progress.remove_task(starting)
        bars = {
            kind: progress.add_task(f"{title}: {kinds}, words", total=words(asks, kind))
            for kind, kinds in KINDS.items()
        }
        return asyncio.run(
            send(server.base_url, asks, lambda ask, n: progress.advance(bars[ask.kind], n))
        )


def progress_on(console: Console) -> Progress:
    """Bars that show how many words have come."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(TextColumn("{task.description:28}"), *columns, console=console)


def words(asks: Sequence[Ask], kind: str) -> int:
    """Tokens that the requests of a kind ask for."""
    return sum(ask.tokens for ask in asks if ask.kind == kind)


def comparison(answers: dict[str, list[Answer]]) -> Table:
    """What a user of either kind feels, on either system."""
    table = Table(title="The same requests, the same machine, the same work")
    table.add_column("", justify="left")
    for name in answers:
        table.add_column(name, justify="right")
    table.add_column("FastServe / stock", justify="right")
    for title, (stock, ours) in figures(answers).items():
        table.add_row(title, f"{stock:.2f} s", f"{ours:.2f} s", f"{ours / stock:.2f}x")
    return table


def figures(answers: dict[str, list[Answer]]) -> dict[str, list[float]]:
    """Seconds, by system in the order of `answers`."""
    found = {}
    for kind, title in KINDS.items():
        groups = [[a for a in of if a.ask.kind == kind] for of in answers.values()]
        found[f"{title}: first word, median"] = [
            statistics.median(a.first_s for a in g) for g in groups
        ]
        found[f"{title}: first word, worst"] = [max(a.first_s for a in g) for g in groups]
        found[f"{title}: whole answer, median"] = [
            statistics.median(a.whole_s for a in g) for g in groups
        ]
        found[f"{title}: longest pause inside"] = [max(a.longest_gap_s for a in g) for g in groups]
    found["everything answered after"] = [
        max(a.ask.at_s + a.whole_s for a in of) for of in answers.values()
    ]
    return found


def terminal_plot(answers: dict[str, list[Answer]]) -> str:
    """Each request's wait for its first word, in the order of arrival, as text."""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(90, 18)
    for marker, (name, of) in zip("ox", answers.items(), strict=True):
        waits = [answer.first_s for answer in of]
        plotext.scatter(list(range(1, len(waits) + 1)), waits, marker=marker, label=name)
    plotext.title("seconds until the first word, request by request")
    plotext.xlabel("request, in order of arrival: stories first, then questions")
    return str(plotext.uncolorize(plotext.build()))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--model", type=Path, help="model folder (default: a seeded tiny model)")
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder of the plot")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 2 for a model that is none."""
    args = parse_arguments(argv)
    console, asks = Console(), burst()
    try:
        shape = shape_of(model_folder(args.model))
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    stories = sum(ask.kind == "story" for ask in asks)
    console.print(
        f"{stories} users ask for a long story; within seconds {len(asks) - stories} others ask a "
        f"short question. The batch has {BATCH} places."
    )
    with tempfile.TemporaryDirectory() as logs, progress_on(console) as progress:
        answers = {
            title: serve_burst(
                system_named(name), shape, asks, Path(logs) / f"{name}.log", progress
            )
            for name, title in SYSTEMS.items()
        }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "demo.png"
    picture(answers).savefig(path, dpi=120)
    print(terminal_plot(answers))
    console.print(comparison(answers))
    console.print(
        "Somebody has to wait: stories now pause for questions. The plot shows when each "
        f"request's words came: {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
