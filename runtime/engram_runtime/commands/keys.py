"""``engram keys``: keys that bundles are signed with."""

from pathlib import Path

import click


@click.group()
def keys() -> None:
    """Make keys to sign bundles with, and show whose signatures count here."""


@keys.command("new")
@click.argument("file", type=click.Path(path_type=Path))
def new(file: Path) -> None:
    """Write a new private key to FILE and its public key to FILE.pub, which others trust by engram trust FILE.pub."""
    from engram_runtime.trust.signature import make_key

    click.echo(make_key(file))


@keys.command("list")
def list_keys() -> None:
    """Show the ids of the keys that are trusted here, one a line."""
    from engram_runtime.trust.signature import trusted_keys

    for key in trusted_keys():
        click.echo(key)
