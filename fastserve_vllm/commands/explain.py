"""`fastserve explain REQUEST_ID FILE`."""

from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fastserve_vllm.trace.explain import facts, merged, shares
from fastserve_vllm.trace.reading import Story, TraceError, read_trace


@click.command()
@click.argument("request_id")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--spans", is_flag=True, help="List every stretch of time, too.")
def command(request_id: str, file: Path, *, spans: bool) -> None:
    """Tell where the time of one request went.

    REQUEST_ID is the id that the client saw, or a part of it; FILE is what
    --fastserve-config.trace_file names.
    """
    try:
        story = read_trace(file).find(request_id)
    except TraceError as error:
        raise click.ClickException(str(error)) from None
    console = Console(highlight=False)
    console.print(story.request_id, style="bold")
    for table in _tables(story, spans=spans):
        console.print(table)


def _tables(story: Story, *, spans: bool) -> Iterator[Table]:
    known = Table(box=None, show_header=False)
    for name, value in facts(story):
        known.add_row(name, value)
    yield known
    time = Table("where the time went", "seconds", "share", box=None)
    for words, seconds, share in shares(story):
        time.add_row(words, f"{seconds:.3f}", f"{share:.1%}")
    yield time
    if spans:
        listed = Table("at", "for", "what", "level", "blocks", "step", "because", box=None)
        for span in merged(story):
            listed.add_row(
                f"{span.start_s - story.arrival_s:.3f}",
                f"{span.end_s - span.start_s:.3f}",
                span.activity,
                str(span.level),
                str(span.blocks),
                str(span.step),
                span.reason,
            )
        yield listed
