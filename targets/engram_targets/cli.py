"""``engram targets``: what bundles can be compiled for."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import json_option
from engram_targets.description import full_description, summary
from engram_targets.profile import load_profile, profile_names

COLUMNS = ("name", "device", "kernels", "evidence")
KEY_WIDTH, LINE_WIDTH = 24, 120
LEGEND = """evidence: what this project has run whole models on: hardware, emulated, simulated; compiled: on nothing
here: whether this machine can run it as far as is known; engram targets show NAME says why not"""


@click.group(invoke_without_command=True)
@click.option("--bundle", type=click.Path(path_type=Path), help="Tell which ones this bundle is compiled for.")
@json_option
@click.pass_context
def targets(context: click.Context, bundle: Path | None, as_json: bool) -> None:
    """List what bundles can be compiled for, and what that has been run on."""
    if context.invoked_subcommand is not None:
        return
    if bundle is not None:
        Bundle.open(bundle)
    listed = [summary(load_profile(name), bundle) for name in profile_names()]
    click.echo(json.dumps({"targets": listed}) if as_json else f"{listing(listed)}\n\n{LEGEND}")


@targets.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show all of target NAME, or of a profile's .toml file, and what it takes to compile for it and to run it."""
    described = full_description(load_profile(name))
    if as_json:
        click.echo(json.dumps(described))
    else:
        reason = described.pop("misfit")
        click.echo("\n".join(lines(described | {"runs here": "yes" if reason is None else f"no, {reason}"})))


def listing(listed: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of summaries."""
    heads = [*COLUMNS, "here", *(["compiled"] if "compiled" in listed[0] else []), "description"]
    rows = [heads, *([_cell(facts, head) for head in heads] for facts in listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def lines(described: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a description for people, a key a line and what lies below a key below it."""
    for key, value in described.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from lines(value, f"{indent}  ")
        else:
            text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            head = f"{indent}{key:{KEY_WIDTH - len(indent)}}"
            yield (
                textwrap.fill(text, LINE_WIDTH, initial_indent=head, subsequent_indent=" " * KEY_WIDTH) or head.rstrip()
            )


def _cell(facts: Mapping[str, Any], head: str) -> str:
    match head:
        case "here":
            return "yes" if facts["misfit"] is None else "no"
        case "compiled":
            return "yes" if facts["compiled"] else ""
    return str(facts[head])
