"""Text of models, files and errors on a terminal, which obeys control characters: no such text may speak to it."""

import sys

import click

# All of C0 and C1 but tab and line feed: with them begin the sequences that move, hide, retitle or paste.
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
CONTROLS[ord("\r")] = ""


def harmless(text: str) -> str:
    """Return a text whose control characters are replaced; carriage returns are left out."""
    return text.translate(CONTROLS)


def show(text: str, *, nl: bool = True) -> None:
    """Print a text: harmless to a terminal, as it is to a file or a pipe."""
    click.echo(harmless(text) if sys.stdout.isatty() else text, nl=nl)
