"""``docs/commands.md``: what every command says of itself when it is asked for help."""

from collections.abc import Iterator

import click

from engram_export.cli import export
from engram_runtime import errors
from engram_runtime.cli import cli

COMMANDS: dict[str, click.Command] = {"engram": cli, "engram-export": export}
WIDTH = 100
TITLE = """# Commands

<!-- written by `python -m tools` -->

What `--help` says of each. Results go to stdout, everything else to stderr. Where a command can't do what was asked it
says why in one sentence and ends with one of these codes:

| exit code | reason |
|---|---|
"""


def command_reference() -> str:
    """Return the page."""
    sections = (section for name, command in COMMANDS.items() for section in help_sections(command, name))
    return "\n".join([TITLE + exit_codes(), *sections])


def exit_codes() -> str:
    """Return the rows of a table of the errors that have an exit code of their own."""
    own = [kind for kind in errors.EngramError.__subclasses__() if kind.__module__ == errors.__name__]
    kinds = sorted(own, key=lambda kind: kind.exit_code)
    return "".join(f"| {kind.exit_code} | {(kind.__doc__ or '').lower().rstrip('.')} |\n" for kind in kinds)


def help_sections(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """Yield a section of the page for a command and each one below it."""
    context = click.Context(command, parent=parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    yield f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from help_sections(found, below, context)
