"""What is asked of a bundle's manifest and files beyond their own checks."""

from collections.abc import Collection
from pathlib import Path

from engram_runtime.errors import BundleError
from engram_runtime.manifest import Manifest
from engram_runtime.trust.levels import Trust
from engram_runtime.trust.names import MANIFEST, SIGNATURE_SUFFIX
from engram_runtime.trust.owners import check_owners


def check_manifest(path: Path, manifest: Manifest, digest: str, trust: Trust) -> None:
    """Hold a manifest and the owners of its files against what an operator asks for.

    Args:
        path: the manifest's. ``digest``: the SHA-256 of its bytes.

    Raises:
        BundleError: it is none of the pinned ones, has no signature, or somebody else can change a file.
        TargetError: it is signed by nobody who is trusted here, or something else was signed.
    """
    if trust.pinned and digest not in trust.pinned:
        raise BundleError(f"{path} has SHA-256 {digest}, none of those of --sha256; get the bundle that was meant")
    if trust.signed:
        from engram_runtime.trust.signature import signed_by

        signed_by(path.with_name(path.name + SIGNATURE_SUFFIX), MANIFEST, digest)
    files = [Path(entry.path) for entry in manifest.files]
    folders = {parent for file in files for parent in file.parents}
    check_owners(path.parent, [path, *(path.parent / each for each in (*folders, *files))])


def checked_files(manifest: Manifest) -> Collection[str]:
    """Return the files whose contents are held against their digests when a bundle is opened strictly.

    All but tables, whose blocks are checked when they are read.
    """
    tables = {path for table in manifest.tables for path in table.files}
    return {entry.path for entry in manifest.files} - tables
