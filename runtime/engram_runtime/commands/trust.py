"""``engram trust``: say whose machine code runs here."""

from pathlib import Path

import click

from engram_runtime.bundle import Bundle
from engram_runtime.commands.options import target_option
from engram_runtime.errors import RequestError, TargetError
from engram_runtime.library import LibraryInfo, find_library, verify_library
from engram_runtime.trust.records import TRUSTED, forget_record, keep_record


@click.command()
@click.argument("what", metavar="BUNDLE|KEY.pub", type=click.Path(path_type=Path))
@target_option
@click.option("--sha256", "digest", metavar="DIGEST", help="Of the library, as its maker told you: another is refused.")
@click.option("--forget", is_flag=True, help="Trust it no longer.")
def trust(what: Path, target: str | None, digest: str | None, forget: bool) -> None:
    """Let the library in BUNDLE that fits this machine run here, or all that the owner of KEY.pub has signed.

    Machine code can do whatever you can. What you compile yourself needs no trust in anybody.
    """
    if what.is_dir():
        _trust_library(Bundle.open(what), target, digest, forget=forget)
    elif target is not None or digest is not None:
        raise RequestError("--target and --sha256 are of a bundle's library, not of a key; leave them out")
    else:
        _trust_key(what, forget=forget)


def _trust_library(bundle: Bundle, target: str | None, digest: str | None, *, forget: bool) -> None:
    folder, info = find_library(bundle, target)
    _check_digest(folder, info, digest)
    if forget:
        known = forget_record(info.digest)
        click.echo(f"{folder} {'is trusted no longer' if known else 'was not trusted'}: {info.digest}")
        return
    verify_library(folder, info)
    keep_record(info, TRUSTED, folder)
    click.echo(f"{folder} is trusted: {info.digest}")


def _check_digest(folder: Path, info: LibraryInfo, digest: str | None) -> None:
    if digest is not None and digest.lower() != info.digest:
        raise TargetError(f"library {folder} has SHA-256 {info.digest}, expected {digest}; get the one that was meant")


def _trust_key(path: Path, *, forget: bool) -> None:
    from engram_runtime.trust.signature import forget_key, key_id, read_public_key, trust_key

    if not forget:
        click.echo(f"{path} is trusted: {trust_key(path)}")
        return
    known = forget_key(path)
    click.echo(f"{path} {'is trusted no longer' if known else 'was not trusted'}: {key_id(read_public_key(path))}")
