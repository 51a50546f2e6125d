"""What the README says can be typed and imported, can be."""

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from engram_export.cli import export
from engram_runtime.cli import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS: dict[str, click.Command] = {"engram": cli, "engram-export": export}
ROWS = re.findall(r"^\| `(engram[^`]*)` \|", README, re.MULTILINE)  # of the table of commands
LINES = re.findall(r"^    \$ (engram[^#\n]*)", README, re.MULTILINE)


def names(command: click.Command, name: str) -> Iterator[str]:
    """Yield the names of all commands that do something themselves."""
    if not isinstance(command, click.Group):
        yield name
        return
    with click.Context(command) as context:
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from names(found, f"{name} {below}")


def parse(words: list[str]) -> None:
    """Parse a command line as its command would; raises click.ClickException for one that it refuses."""
    command = COMMANDS[words.pop(0)]
    while isinstance(command, click.Group):
        with click.Context(command) as context:
            _, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
    command.make_context(None, words)


@pytest.mark.parametrize("line", [*ROWS, *LINES])
def test_commands_in_the_readme_are_taken(line: str) -> None:
    parse(shlex.split(line))


def test_every_command_is_in_the_table_of_the_readme() -> None:
    told = {re.split(" (?=[A-Z-])", row)[0] for row in ROWS}
    assert set(names(cli, "engram")) - told == set()


def test_names_that_the_readme_imports_exist() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert {alias.name for alias in node.names} <= set(module.__all__)
