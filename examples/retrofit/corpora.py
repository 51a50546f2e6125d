"""Texts to train against and to measure on: packages of Debian, fetched by name and hash and unpacked in Python.

A package is read, never installed. What is fetched stays in the work folder; nothing of it goes into the repository but
the dictionary entries that a cartridge holds.
"""

import gzip
import hashlib
import http.client
import io
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from engram_runtime.errors import RequestError
from engram_runtime.new_file import new_file

MIRROR = "http://deb.debian.org/debian/pool/main"  # plain http: the hash says whether it is the file
TIMEOUT_S = 60
AR_MAGIC, AR_HEADER_BYTES = b"!<arch>\n", 60  # ar(5): name 16, time 12, owner 6, group 6, mode 8, size 10, "`\n"
AR_SIZE = slice(48, 58)


@dataclass(frozen=True, slots=True)
class Package:
    """A file of the mirror: where it is, what it must be, and under which licence its text may be used."""

    path: str
    num_bytes: int
    sha256: str
    licence: str

    @property
    def file_name(self) -> str:
        """What it is called in the work folder."""
        return PurePosixPath(self.path).name


WORDNET = Package(
    "w/wordnet/wordnet-base_3.0-37_all.deb",
    6_467_132,
    "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    "WordNet 3.0 licence (permissive)",
)
JARGON = Package(
    "d/dict-jargon/dict-jargon_4.4.7-3.1_all.deb",
    621_608,
    "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
    "public domain",
)
FOLDOC = Package(
    "d/dict-foldoc/dict-foldoc_20230119-1_all.deb",
    2_408_824,
    "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
    "GNU Free Documentation Licence",
)
DEVILS_DICTIONARY = Package(
    "d/dict-devil/dict-devil_1.0-13.1_all.deb",
    179_760,
    "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
    "public domain",
)
DEBIAN_REFERENCE = Package(
    "d/debian-reference/debian-reference-en_2.100_all.deb",
    1_704_872,
    "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
    "GPL 2 or later",
)


def fetch(package: Package, folder: Path) -> Path:
    """Return the package's file in ``folder``, fetched from the mirror if it is not there.

    Raises:
        RequestError: the mirror does not serve it, or what it serves is not the file that was asked for.
    """
    place = folder / package.file_name
    if not place.is_file():
        content = download(f"{MIRROR}/{package.path}", place, max_bytes=package.num_bytes)
        require_sha256(content, package.sha256, package.file_name)
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(place, replace=True) as file:
            file.write(content)
    require_sha256(place.read_bytes(), package.sha256, str(place))
    return place


def download(url: str, place: Path, *, max_bytes: int) -> bytes:
    """Return what a URL serves.

    Args:
        place: where a user can put the file instead.

    Raises:
        RequestError: it can't be fetched, or is larger than ``max_bytes``.
    """
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            content: bytes = response.read(max_bytes + 1)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as err:
        raise RequestError(f"can't fetch {url}: {err}; fetch it by hand and put it at {place}") from err
    if len(content) > max_bytes:
        raise RequestError(f"{url} is larger than {max_bytes} bytes; it is not the file this was written for")
    return content


def require_sha256(content: bytes, sha256: str, name: str) -> None:
    """Refuse content of another hash.

    Raises:
        RequestError: naming both hashes.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise RequestError(f"{name} has sha256 {found}, expected {sha256}; remove it and fetch it again")


def files_of_deb(package: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of the plain files of a Debian package whose path, as ``usr/share/...``, is wanted.

    Raises:
        RequestError: it is not a Debian package.
    """
    name, content = next((item for item in _ar_members(package) if item[0].startswith("data.tar")), ("", b""))
    if not name:
        raise RequestError(f"{package} holds no data.tar; it is not a Debian package")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:*") as archive:
        for member in archive:
            path = member.name.removeprefix("./")
            if member.isfile() and wanted(path):
                file = archive.extractfile(member)
                assert file is not None
                yield path, file.read()


def text_of_deb(package: Path, path: str) -> str:
    """Return the text of one file of a Debian package that gzip or dictzip wrote.

    Raises:
        RequestError: the package has no such file.
    """
    for _, content in files_of_deb(package, lambda found: found == path):
        return gzip.decompress(content).decode("utf-8", errors="replace")
    raise RequestError(f"{package} has no file {path}; it is another package than this was written for")


def _ar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each member of an ar archive."""
    content = path.read_bytes()
    if not content.startswith(AR_MAGIC):
        raise RequestError(f"{path} begins with {content[:8]!r}, expected {AR_MAGIC!r}; it is not a Debian package")
    at = len(AR_MAGIC)
    while at < len(content):
        header = content[at : at + AR_HEADER_BYTES]
        begin, size = at + AR_HEADER_BYTES, int(header[AR_SIZE])
        yield header[:16].decode("ascii").rstrip(" /"), content[begin : begin + size]
        at = begin + size + size % 2  # members begin at even offsets
