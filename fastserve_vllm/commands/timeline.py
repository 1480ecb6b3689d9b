"""`fastserve timeline FILE... -o page.html`."""

import json
from pathlib import Path

import click

from fastserve_vllm.trace.chrome import chrome_trace
from fastserve_vllm.trace.page import timeline_page
from fastserve_vllm.trace.reading import TraceError, read_trace

_WRITABLE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@click.argument(
    "files",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option("-o", "--output", type=_WRITABLE, help="Write a page for the browser.")
@click.option("--chrome", type=_WRITABLE, help="Write a trace for Perfetto, of one FILE.")
def command(files: tuple[Path, ...], output: Path | None, chrome: Path | None) -> None:
    """Draw the requests of a trace over time: a row each, colour is state.

    Several FILEs are drawn below each other on one time scale, to be compared.
    """
    if output is None and chrome is None:
        raise click.UsageError("name what to write: -o PAGE.html or --chrome TRACE.json")
    if chrome is not None and len(files) != 1:
        raise click.UsageError("--chrome takes one FILE")
    try:
        traces = [read_trace(file) for file in files]
    except TraceError as error:
        raise click.ClickException(str(error)) from None
    if output is not None:
        output.write_text(timeline_page(traces), encoding="utf-8")
        click.echo(f"{output}: {sum(len(trace.stories) for trace in traces)} requests")
    if chrome is not None:
        chrome.write_text(json.dumps(chrome_trace(traces[0])), encoding="utf-8")
        click.echo(f"{chrome}: open it in https://ui.perfetto.dev or chrome://tracing")
