"""How much is asked of who made a bundle and its machine code."""

import re
from dataclasses import dataclass

from engram_runtime.errors import RequestError

LOCAL, SIGNED = LEVELS = ("local", "signed")
DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Trust:
    """What an operator asks for.

    Machine code always runs only if this user compiled it here, said that it may run, signed it or trusts who did.

    Attributes:
        signed: the manifest and the library must be signed by a key that this user trusts.
        pinned: where there are any, the manifest's SHA-256 must be among them, and a library whose description's is
            runs whoever made it.
    """

    signed: bool = False
    pinned: tuple[str, ...] = ()

    @property
    def strict(self) -> bool:
        """Whether files must be what the manifest says byte by byte, and nobody else's to change."""
        return self.signed or bool(self.pinned)


LOCALLY = Trust()


def parse_trust(level: str, digests: tuple[str, ...]) -> Trust:
    """Return what ``--trust`` and ``--sha256`` ask for; raises RequestError for what is no digest."""
    pinned = tuple(digest.lower() for digest in digests)
    for digest in pinned:
        if not DIGEST.fullmatch(digest):
            raise RequestError(f"--sha256 is {digest!r}, expected 64 hexadecimal digits; engram inspect shows them")
    return Trust(signed=level == SIGNED, pinned=pinned)
