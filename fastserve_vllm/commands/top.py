"""`fastserve top --url http://host:8000`."""

import time

import click
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastserve_vllm.commands.scrape import Change, NotServedError, Reading, read

_BAR = 24
_MIB = 1 << 20


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server.")
@click.option("--interval", default=2.0, show_default=True, help="Seconds between readings.")
@click.option("--once", is_flag=True, help="Print one view of one interval, and end.")
def command(url: str, interval: float, *, once: bool) -> None:
    """Watch a running server in the terminal, from its /metrics alone."""
    console = Console()
    try:
        before = read(url)
        time.sleep(interval)
        now = read(url)
        if once:
            console.print(view(Change(before, now)))
            return
        with Live(view(Change(before, now)), console=console, screen=True) as live:
            while True:
                time.sleep(interval)
                before, now = now, read(url)
                live.update(view(Change(before, now)))
    except NotServedError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        return


def view(change: Change) -> RenderableType:
    """Everything at once."""
    return Group(
        _head(change),
        Text(),
        Columns([_levels(change.now), _states(change.now), _memory(change)], padding=(0, 4)),
        Text(),
        _work(change),
    )


def _head(change: Change) -> Text:
    now = change.now
    running, limit = now.total("jobs", state="running"), now.total("batch_limit")
    waiting = now.total("jobs") - running
    longest_s = max(now.by("longest_wait_seconds", "level").values(), default=0.0)
    step_s = change.share(
        change.rate("step_seconds", "_sum"), change.rate("step_seconds", "_count")
    )
    words = [
        ", ".join(now.labels("model_name")),
        f"engines {', '.join(now.labels('engine'))}",
        f"running {running:.0f} of {limit:.0f}",
        f"waiting {waiting:.0f}, {longest_s:.1f} s at most",
        "idle" if step_s is None else f"{1000 * step_s:.1f} ms a step",
    ]
    return Text("   ".join(words), style="bold")


def _levels(now: Reading) -> Table:
    table = Table("level", "requests", "longest wait", "quantum", title="Queues", box=None)
    waits, quanta = now.by("longest_wait_seconds", "level"), now.by("quantum_seconds", "level")
    jobs = now.by("level_jobs", "level")
    most = max(jobs.values(), default=0.0)
    for level in sorted(jobs, key=int):
        quantum = f"{1000 * quanta[level]:.1f} ms" if level in quanta else "endless"
        bar = _bar(jobs[level], most, 12)
        table.add_row(level, f"{bar} {jobs[level]:.0f}", f"{waits.get(level, 0.0):.2f} s", quantum)
    return table


def _states(now: Reading) -> Table:
    table = Table("state", "requests", title="Requests", box=None)
    for state, requests in now.by("jobs", "state").items():
        table.add_row(state, f"{requests:.0f}")
    return table


def _memory(change: Change) -> Table:
    now = change.now
    table = Table("", "in use", "", title="KV cache", box=None)
    for name, place in (("device_blocks", "device"), ("host_blocks", "host")):
        whole = now.total(name)
        if whole:
            held = now.total(name, use="held") + now.total(name, use="leaving")
            table.add_row(place, f"{_bar(held, whole)} {held / whole:.0%}", f"of {whole:.0f}")
    for direction in ("out", "in"):
        mib_s = change.rate("copied_bytes", direction=direction) / _MIB
        flying = now.total("in_flight_blocks", direction=direction)
        table.add_row(f"copied {direction}", f"{mib_s:.1f} MiB/s", f"{flying:.0f} in flight")
    stalled = change.share(change.rate("copy_wait_seconds"), change.rate("step_seconds", "_sum"))
    table.add_row("steps stand still", "-" if stalled is None else f"{stalled:.1%}", "")
    return table


def _work(change: Change) -> Table:
    stepping = change.rate("step_seconds", "_sum")
    own = change.share(change.rate("scheduler_seconds"), stepping)
    right = change.share(change.rate("predicted_step_seconds"), stepping)
    table = Table(title="A second", box=None)
    columns = {
        "turns": change.rate("started"),
        "paused": change.rate("preemptions", mode="paused"),
        "swapped out": change.rate("swapped_out"),
        "swapped in": change.rate("swapped_in"),
        "recomputed": change.rate("preemptions", mode="recomputed"),
        "demoted": change.rate("demotions"),
        "raised": change.rate("promotions") + change.rate("aged_turns"),
        "declined": change.rate("declined"),
        "prefill tokens": change.rate("batch_tokens", phase="prefill"),
        "decode tokens": change.rate("batch_tokens", phase="decode"),
    }
    for name in (*columns, "own time", "predicted"):
        table.add_column(name, justify="right")
    shares = ["-" if share is None else f"{share:.1%}" for share in (own, right)]
    table.add_row(*(f"{figure:.1f}" for figure in columns.values()), *shares)
    return table


def _bar(part: float, whole: float, width: int = _BAR) -> str:
    filled = round(width * part / whole) if whole else 0
    return "█" * filled + "·" * (width - filled)
