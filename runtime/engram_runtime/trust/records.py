"""What this user has said of libraries, by their content: a file each in the user's state folder.

A record is named by `LibraryInfo.digest`, which holds the digests of all of a library's files, and so is as good
wherever the library lies.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engram_runtime.errors import BundleError, TargetError
from engram_runtime.library import LibraryInfo
from engram_runtime.strict_json import Fields, read_json_object, version_error
from engram_runtime.trust.state import own_file, write_own

FOLDER, VERSION = "libraries", 1
COMPILED, TRUSTED = HOW = ("compiled", "trusted")


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryRecord:
    """Why a library may run: this user compiled it here, or said that it is trusted.

    Attributes:
        place: where it lay then, for people.
    """

    digest: str
    how: str
    target: str
    place: str

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a file; raises BundleError naming the key."""
        fields = Fields(read_json_object(path), str(path))
        if (found := fields.count("version")) != VERSION:
            raise version_error(f"{path} has", found, VERSION, "make it again")
        record = cls(
            digest=path.name,
            how=fields.take("how", str),
            target=fields.take("target", str),
            place=fields.take("place", str),
        )
        fields.finish()
        if record.how not in HOW:
            raise BundleError(f"{path} says {record.how!r}, expected one of {list(HOW)}")
        return record


def keep_record(info: LibraryInfo, how: str, place: Path) -> None:
    """Note that a library may run here.

    Raises:
        OSError: this user's state folder can't be written.
        TargetError: others can write to it.
    """
    facts = {"version": VERSION, "how": how, "target": info.target, "place": str(place.absolute())}
    write_own(FOLDER, info.digest, (json.dumps(facts) + "\n").encode())


def record_of(digest: str) -> LibraryRecord | None:
    """Return what was noted of a library, or None where nothing was.

    Raises:
        TargetError: it is damaged, or others can write to it.
    """
    path = own_file(FOLDER, digest)
    try:
        return None if path is None else LibraryRecord.read(path)
    except BundleError as error:
        raise TargetError(f"{error}; delete it and compile or trust the library again") from error


def forget_record(digest: str) -> bool:
    """Forget a library; returns whether there was a record of it."""
    if (path := own_file(FOLDER, digest)) is None:
        return False
    path.unlink()
    return True
