"""`fastserve simulate`: what a policy would do with a trace, without an engine."""

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fastserve_vllm.commands import inputs
from fastserve_vllm.simulator.run import capacity_rps, simulate
from fastserve_vllm.traces import InputError

COLUMNS = (
    ("TTFT mean ms", "ttft_ms", "mean"),
    ("TTFT P95 ms", "ttft_ms", "p95"),
    ("normalized ms", "normalized_ms", "mean"),
    ("e2e mean ms", "e2e_ms", "mean"),
    ("e2e P99 ms", "e2e_ms", "p99"),
    ("longest gap P95 ms", "longest_gap_ms", "p95"),
)


@click.command()
@inputs.trace_options()
@click.option(
    "--policy", default="fastserve", show_default=True, help="Policy, objective, or JSON."
)
@click.option("--compare", multiple=True, help="Another one; may be given several times.")
@inputs.arrival_options()
@inputs.engine_options()
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write.")
def command(*, policy: str, compare: tuple[str, ...], output: Path | None, **options: Any) -> None:
    """Simulate policies on a trace: the live scheduler's own decisions, in simulated time."""
    inputs.check_exclusive(options)
    common = inputs.json_object(options["config"])
    configurations = {name: inputs.configuration(name, common) for name in (policy, *compare)}
    try:
        rows, shape = inputs.rows(options), inputs.shape(options)
        capacity = capacity_rps(shape, rows, options["seed"])
        rate_rps = options["rate"] or (options["load"] or 1.0) * capacity
        results = {
            name: simulate(shape, config, inputs.requests(rows, rate_rps, options))
            for name, config in configurations.items()
        }
    except (InputError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    _show(results, rate_rps, capacity)
    if output is not None:
        document = {"rate_rps": rate_rps, "capacity_rps": capacity, "systems": results}
        output.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def figures_table(title: str, results: dict[str, dict[str, Any]]) -> Table:
    """A row a system, a column a figure."""
    table = Table(title=title)
    table.add_column("")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right")
    for name, figures in results.items():
        cells = ((figures[group] or {}).get(figure) for _, group, figure in COLUMNS)
        table.add_row(name, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    return table


def _show(results: dict[str, dict[str, Any]], rate_rps: float, capacity: float) -> None:
    first = next(iter(results.values()))
    title = (
        f"{first['requests']:,} requests, {rate_rps:.3g} a second, "
        f"{rate_rps / capacity:.2f} of what first come, first served sustains"
    )
    Console().print(figures_table(title, results))
