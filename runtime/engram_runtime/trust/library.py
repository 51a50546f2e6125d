"""Which libraries of a bundle may be loaded, and why."""

from pathlib import Path

from engram_runtime.bundle import Bundle
from engram_runtime.errors import TargetError
from engram_runtime.library import LIBRARY_INFO_NAME, LibraryInfo, find_library, verify_library
from engram_runtime.trust.names import LIBRARY, SIGNATURE_SUFFIX
from engram_runtime.trust.owners import check_owners
from engram_runtime.trust.records import COMPILED, record_of
from engram_runtime.trust.trial import require_trial

COMPILED_HERE, NAMED, PINNED, SIGNED = "compiled here", "trusted here", "pinned by its digest", "signed"
UNTRUSTED = "was neither compiled by this user here nor signed by a key that is trusted here"


def trusted_library(bundle: Bundle, target: str | None = None) -> tuple[Path, LibraryInfo]:
    """Return folder and description of a library that fits this machine and may be loaded.

    One that wasn't compiled here has run in a process of its own by then.

    Raises:
        BundleError, TargetError: as `find_library`; or it may not be loaded, others can change it where more than local
            trust is asked for, or it ends the process that runs it.
    """
    folder, info = find_library(bundle, target)
    why = required_reason(bundle, folder, info)
    if bundle.trust.strict:
        check_owners(folder, [folder / LIBRARY_INFO_NAME, *(folder / name for name in info.files.values())])
        verify_library(folder, info)
    if why != COMPILED_HERE:
        require_trial(bundle, folder, info)
    return folder, info


def reason(bundle: Bundle, folder: Path, info: LibraryInfo) -> str | None:
    """Say why a library may be loaded, or None if it may not; raises TargetError where records can't be relied on."""
    if bundle.trust.signed:
        return _signed(folder, info)
    if (record := record_of(info.digest)) is not None:
        return COMPILED_HERE if record.how == COMPILED else NAMED
    if info.digest in bundle.trust.pinned:
        return PINNED
    return _signed(folder, info) if (folder / (LIBRARY_INFO_NAME + SIGNATURE_SUFFIX)).exists() else None


def required_reason(bundle: Bundle, folder: Path, info: LibraryInfo) -> str:
    """Say why a library may be loaded; raises TargetError if it may not, and what `reason` raises."""
    if (why := reason(bundle, folder, info)) is None:
        raise TargetError(f"library {folder} {UNTRUSTED}; {mend(bundle, info)}")
    return why


def _signed(folder: Path, info: LibraryInfo) -> str:
    from engram_runtime.trust.signature import signed_by

    return f"{SIGNED} by {signed_by(folder / (LIBRARY_INFO_NAME + SIGNATURE_SUFFIX), LIBRARY, info.digest)}"


def mend(bundle: Bundle, info: LibraryInfo) -> str:
    """Return what makes a library one that may run: a packed bundle has no graph to compile."""
    trust = f"engram trust {bundle.path} --target {info.target}"
    if bundle.manifest.omitted:
        return f"if you trust who packed it, run: {trust}"
    return f"run: engram compile {bundle.path} --target {info.target} --rebuild, or, if you trust who made it: {trust}"
