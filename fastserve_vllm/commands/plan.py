"""`fastserve plan`: how many replicas a trace and its targets need, without an engine."""

import json
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

from fastserve_vllm.commands import inputs
from fastserve_vllm.commands.simulate import figures_table
from fastserve_vllm.config import FastServeConfig
from fastserve_vllm.simulator.fleet import Fleet
from fastserve_vllm.simulator.fleet_size import fewest_replicas
from fastserve_vllm.simulator.routers import ROUTERS
from fastserve_vllm.simulator.run import capacity_rps, simulate_fleet
from fastserve_vllm.simulator.targets import METRICS, Scorecard, Target, TargetError
from fastserve_vllm.traces import InputError

POLICIES = ("fcfs", "fastserve")
_CAPACITY_REQUESTS = 5000
_FALLS_BEHIND = "falls behind: more arrives than it can do"


def _targets(_ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]) -> list[Target]:
    try:
        return [Target.parse(text) for text in texts]
    except TargetError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@inputs.trace_options()
@click.option(
    "--slo",
    "targets",
    multiple=True,
    callback=_targets,
    metavar="METRIC_STATISTIC=LIMIT",
    help=f"A target, such as ttft_p95=0.5s or normalized_mean=80ms; all have to be met. Metrics: "
    f"{', '.join(METRICS)}. Statistics: mean, max, p1 to p99.99. Units: s, ms.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=POLICIES,
    show_default=True,
    help="Policy, objective, or JSON; each is planned for, and compared with the first.",
)
@click.option(
    "--router",
    type=click.Choice(sorted(ROUTERS)),
    default="least-loaded",
    show_default=True,
    help="Who gets a request.",
)
@click.option("--replicas", type=click.IntRange(1), help="Do not search: simulate so many.")
@click.option("--max-replicas", type=click.IntRange(1), default=1024, show_default=True)
@inputs.arrival_options()
@inputs.engine_options()
@click.option("--json", "output", type=click.Path(dir_okay=False, path_type=Path), help="Write.")
def command(*, targets: list[Target], output: Path | None, **options: Any) -> None:
    """Say how many replicas a trace and its targets need, under each policy.

    --rate is of the whole fleet; --load counts in what one replica sustains with first come, first
    served, so that --load 20 keeps at least 20 replicas busy.
    """
    inputs.check_exclusive(options)
    if not targets and options["replicas"] is None:
        raise click.UsageError("give --slo at least once, or --replicas")
    if options["load"] is None and options["rate"] is None:
        raise click.UsageError("give one of --load and --rate")
    common = inputs.json_object(options["config"])
    configurations = {name: inputs.configuration(name, common) for name in options["policies"]}
    try:
        planner = FleetPlanner(options, targets)
        found = {name: planner.plan(config) for name, config in configurations.items()}
    except (InputError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    document = planner.document(found)
    _show(document, Console())
    if output is not None:
        output.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class FleetPlanner:
    """Simulates fleets of different sizes on the same requests.

    Args:
        options: of the command line.
        targets: what is to be met.

    Raises:
        InputError: the trace cannot be used, or not with this router.
    """

    def __init__(self, options: dict[str, Any], targets: list[Target]) -> None:
        self.options = options
        self.targets = targets
        self.rows, self.shape = inputs.rows(options), inputs.shape(options)
        self.router = options["router"]
        if self.router == "prefix-affine" and not any(row.prefix for row in self.rows):
            raise InputError(
                "--router prefix-affine needs a trace with the columns prefix and prefix_tokens"
            )
        self.count: int = options["requests"]
        if options["trace_arrivals"]:
            self.count = min(self.count, len(self.rows))
        self.capacity = capacity_rps(self.shape, self.rows, options["seed"], _CAPACITY_REQUESTS)
        self.rate_rps: float = options["rate"] or options["load"] * self.capacity

    @property
    def least(self) -> int:
        """Replicas that can do what arrives; fewer would meet targets only until the trace ends."""
        return math.ceil(self.rate_rps / self.capacity - 1e-9)

    def plan(self, config: FastServeConfig) -> dict[str, Any]:
        """What a policy needs: size, figures, and how every size that was tried did."""
        tried: dict[int, dict[str, Any]] = {}

        def meets(replicas: int) -> bool:
            tried[replicas] = self._try(config, replicas)
            return not tried[replicas]["missed"]

        fixed: int | None = self.options["replicas"]
        replicas = fixed
        if fixed is not None:
            meets(fixed)
        else:
            replicas = fewest_replicas(meets, self.least, self.options["max_replicas"])
        return {"replicas": replicas, "tried": tried}

    def document(self, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """All that came out."""
        return {
            "rate_rps": self.rate_rps,
            "capacity_rps": self.capacity,
            "requests": self.count,
            "router": self.router,
            "targets": [target.text for target in self.targets],
            "searched": self.options["replicas"] is None,
            "max_replicas": self.options["max_replicas"],
            "policies": found,
            "savings": _savings(found),
        }

    def _try(self, config: FastServeConfig, replicas: int) -> dict[str, Any]:
        """One run: it ends early once a target is missed for certain, where a size is searched."""
        scorecard = Scorecard(self.targets, self.count)
        fleet = Fleet(self.shape, config, replicas, ROUTERS[self.router]())
        requests = inputs.requests(self.rows, self.rate_rps, self.options)
        whole = self.options["replicas"] is not None
        figures = simulate_fleet(fleet, requests, scorecard, to_the_end=whole)
        return {
            "missed": [target.text for target in scorecard.missed],
            "reached": {score.target.text: score.reached for score in scorecard.scores},
            "figures": figures,
        }


def _savings(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Share of the first policy's replicas that each of the others does without."""
    (_, first), *others = found.items()
    if first["replicas"] is None:
        return {}
    return {
        name: 1 - plan["replicas"] / first["replicas"]
        for name, plan in others
        if plan["replicas"] is not None
    }


def _show(document: dict[str, Any], console: Console) -> None:
    plans: dict[str, dict[str, Any]] = document["policies"]
    load = document["rate_rps"] / document["capacity_rps"]
    title = (
        f"{document['requests']:,} requests, {document['rate_rps']:.4g} a second, {load:.4g} times "
        f"what a replica sustains, {document['router']}"
    )
    if document["searched"]:
        console.print(_needed(title, document))
    figures = {
        f"{name} ({plan['replicas']})": plan["tried"][plan["replicas"]]["figures"]
        for name, plan in plans.items()
        if plan["replicas"] is not None
    }
    if figures:
        console.print(figures_table("" if document["searched"] else title, figures))
    if not document["searched"] and document["targets"]:
        console.print(_verdicts(document))


def _needed(title: str, document: dict[str, Any]) -> Table:
    table = Table("", *_right("replicas needed", "saving"), "one fewer misses", title=title)
    for name, plan in document["policies"].items():
        size, saving = plan["replicas"], document["savings"].get(name)
        below = plan["tried"].get((size or 0) - 1, {}).get("missed", [_FALLS_BEHIND])
        if size is None:
            size = f"over {document['max_replicas']}"
            below = plan["tried"][max(plan["tried"])]["missed"] if plan["tried"] else below
        table.add_row(name, str(size), "" if saving is None else f"{saving:.0%}", ", ".join(below))
    return table


def _verdicts(document: dict[str, Any]) -> Table:
    table = Table("", *document["targets"])
    for name, plan in document["policies"].items():
        run = plan["tried"][plan["replicas"]]
        cells = [
            f"{'missed' if text in run['missed'] else 'met'} ({_reached(text, reached)})"
            for text, reached in run["reached"].items()
        ]
        table.add_row(name, *cells)
    return table


def _reached(text: str, reached: float) -> str:
    return f"{reached:.4g} s" if Target.parse(text).share is None else f"{reached:.2%}"


def _right(*titles: str) -> list[Column]:
    return [Column(title, justify="right") for title in titles]
