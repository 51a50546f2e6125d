"""``engram sign``: vouch for a bundle and its libraries."""

from pathlib import Path

import click

from engram_runtime.bundle import MANIFEST_NAME, Bundle, file_sha256
from engram_runtime.commands.options import bundle_argument
from engram_runtime.library import LIBRARY_INFO_NAME, library_infos, verify_library
from engram_runtime.trust.library import required_reason
from engram_runtime.trust.names import LIBRARY, MANIFEST, SIGNATURE_SUFFIX


@click.command("sign")
@bundle_argument
@click.option("--key", required=True, type=click.Path(path_type=Path), help="Private key, of engram keys new.")
def sign_command(bundle: Path, key: Path) -> None:
    """Sign BUNDLE's manifest and its libraries, once all files are found to be what these say.

    A library that you neither compiled nor trust is not signed, as others would run it on your word. The signatures
    lie beside them. Sign again after compiling or packing, which make other libraries or manifests.
    """
    from engram_runtime.trust.signature import read_private_key, sign

    private = read_private_key(key)
    opened = Bundle.open(bundle)
    libraries = library_infos(opened)
    opened.verify_digests()
    for folder, info in libraries:
        verify_library(folder, info)
        required_reason(opened, folder, info)
    signed = [(bundle / MANIFEST_NAME, MANIFEST, file_sha256(bundle / MANIFEST_NAME))]
    signed += [(folder / LIBRARY_INFO_NAME, LIBRARY, info.digest) for folder, info in libraries]
    for path, kind, digest in signed:
        sign(path.with_name(path.name + SIGNATURE_SUFFIX), kind, digest, private)
        click.echo(f"{path}: {digest}")
