"""The `fastserve` command: tools beside the server. One module a subcommand.

A module is imported when its subcommand runs, so that one does not pay for the imports of the
others, and none of them imports vLLM unless it needs it.
"""

from importlib import import_module

import click

SUBCOMMANDS = {
    "explain": "Tell where the time of one request went.",
    "plan": "Say how many replicas a trace and its targets need.",
    "simulate": "Try policies on a trace, without an engine.",
    "timeline": "Draw the requests of a trace over time.",
    "top": "Watch a running server in the terminal.",
}
"""Name and one line of help of each module here that has a click command `command`."""


class _Lazy(click.Group):
    """Imports a subcommand's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, sorted."""
        return sorted(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand of that name."""
        if cmd_name not in SUBCOMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List names and help without an import."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(SUBCOMMANDS.items()))


@click.command(cls=_Lazy)
def main() -> None:
    """See what FastServe's scheduler does, and try it out."""
