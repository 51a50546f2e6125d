"""A bundle on disk: opened, checked, its paths resolved."""

import hashlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import BundleError, TableError
from engram_runtime.keyer_spec import KeyerSpec, NgramKeyerSpec
from engram_runtime.keyers import Keyer
from engram_runtime.manifest import DRAFT_HEAD, FileEntry, Manifest
from engram_runtime.named_errors import naming
from engram_runtime.strict_json import parse_json_object, read_json_bytes
from engram_runtime.table_spec import RowRange
from engram_runtime.trust.levels import LOCALLY, Trust
from engram_runtime.trust.manifest import check_manifest, checked_files

MANIFEST_NAME = "engram.json"
MODEL_CARD = "README.md"  # for people: nothing here reads it
DIGEST_BLOCK_BYTES = 1 << 20
OPTIONAL_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "golden/golden.json",
)
SEAL = "sha256"  # the manifest's last key: the digest of its file, in which 64 zeros stand for it; since version 3
UNSEALED_VERSION = 2
NO_DIGEST = "0" * 64
IDENTITY_BYTES = 64 << 10  # holds a safetensors header, which names every tensor and its place


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder whose manifest is sound and whose files have the sizes it states; ``trust`` is what was asked of it."""

    path: Path
    manifest: Manifest
    trust: Trust = LOCALLY

    @classmethod
    def open(cls, path: Path, trust: Trust = LOCALLY) -> Self:
        """Read the manifest and check that every file is there; contents are checked by `verify_digests`.

        Args:
            trust: with more than local trust, the contents of all files but tables are checked here.

        Raises:
            BundleError: not a bundle, of another version, or a file is missing, a link or of another size; or it is not
                what ``trust`` asks for, nor its files this user's or root's alone to change.
            TargetError: a signature is asked for and is not by a key that is trusted here.
        """
        if not (path / MANIFEST_NAME).is_file():
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST_NAME}; make one with engram-export")
        plain_file(path, MANIFEST_NAME)
        text = read_json_bytes(path / MANIFEST_NAME)
        raw = parse_json_object(text, str(path / MANIFEST_NAME))
        is_sealed = raw.get("format_version") != UNSEALED_VERSION
        seal = raw.pop(SEAL, None) if is_sealed else None
        try:
            bundle = cls(path, Manifest.from_dict(raw), trust)
            if is_sealed:
                _check_seal(text, seal)
        except BundleError as error:
            raise BundleError(f"{path / MANIFEST_NAME}: {error}") from error
        for entry in bundle.manifest.files:
            bundle._check_file(entry)
        bundle._refuse_unlisted()
        if trust.strict:
            digest = hashlib.sha256(text).hexdigest()
            check_manifest(path / MANIFEST_NAME, bundle.manifest, digest, trust)
            bundle.verify_digests(only=checked_files(bundle.manifest))
        return bundle

    def file(self, relative: str) -> Path:
        """Return the path of a listed file."""
        return self.path / relative

    def graph_file(self, relative: str) -> Path:
        """Return the path of a graph's file or of its weights; raises BundleError where it was left out."""
        if any(entry.path == relative for entry in self.manifest.omitted):
            raise BundleError(
                f"bundle {self.path} was packed without {relative}, which this needs; use the bundle it was made of, "
                f"or pack that again with --with-graph"
            )
        return self.file(relative)

    def table_path(self, rows: RowRange) -> Path:
        """Return the file that holds rows, inside the bundle or referred to.

        Raises:
            TableError: a file that is referred to is gone or is another one by now.
        """
        if not rows.external:
            return self.file(rows.file)
        path = Path(rows.file)
        try:
            found = file_identity(path)
        except OSError as error:
            raise TableError(f"table file {path} can't be opened: {error.strerror}; export the bundle again") from error
        if found != rows.identity:
            raise TableError(f"table file {path} is not the one this bundle was exported from; export it again")
        return path

    def keyer(self, spec: KeyerSpec) -> Keyer:
        """Build a table's keyer, reading its token map.

        Raises:
            BundleError: a token map that is not the vocabulary's, or a product of id and multiplier beyond 64 bits.
        """
        token_map = None
        if isinstance(spec, NgramKeyerSpec) and spec.token_map is not None:
            token_map = self._token_map(spec.token_map)
        return spec.keyer(self.manifest.model.vocab_size, token_map)

    def draft_vocabulary(self) -> NDArray[np.int64]:
        """Return the ids ``[n]`` of the tokens that the draft head's logits are for.

        Raises:
            BundleError: there is no head, or its ids are not those of tokens, one for each logit.
        """
        head, relative = self.manifest.graph(DRAFT_HEAD), self.manifest.draft_vocabulary
        assert relative is not None  # see `Manifest.check`
        vocab_size, expected = self.manifest.model.vocab_size, head.outputs[0].shape[-1]
        data = self.read_checked(relative)
        if len(data) != 4 * expected:
            raise BundleError(
                f"{relative} holds {len(data)} bytes, the draft head's {expected} logits need {4 * expected}; "
                f"export again"
            )
        values = np.frombuffer(data, dtype="<i4").astype(np.int64)
        if values.min() < 0 or values.max() >= vocab_size:
            raise BundleError(
                f"{relative} holds ids {values.min()} to {values.max()}, expected 0 to {vocab_size - 1}; export again"
            )
        return values

    def read_checked(self, relative: str) -> bytes:
        """Return what a file holds; for small ones, on which what is computed depends.

        Raises:
            BundleError: it can't be read, or its contents are not those the manifest states.
        """
        listed = {entry.path: entry for entry in self.manifest.files}
        try:
            data = self.file(relative).read_bytes()
        except OSError as error:
            raise BundleError(
                f"{self.file(relative)} can't be read: {error.strerror}; export the bundle again"
            ) from error
        if relative in listed:  # where nothing is, the bundle is being exported
            _check_digest(listed[relative], hashlib.sha256(data).hexdigest())
        return data

    def verify_digests(
        self, progress: Callable[[int], None] = lambda count: None, *, only: Container[str] | None = None
    ) -> None:
        """Hash every file, or the paths in ``only``; ``progress`` is told the bytes of each block.

        Raises:
            BundleError: naming the first file whose contents differ.
        """
        for entry in self.manifest.files:
            if only is not None and entry.path not in only:
                continue
            _check_digest(entry, file_sha256(self.file(entry.path), progress))

    def _refuse_unlisted(self) -> None:
        """Refuse a file this runtime would read although the manifest does not vouch for it."""
        listed = {entry.path for entry in self.manifest.files}
        for name in OPTIONAL_FILES:
            if name not in listed and os.path.lexists(self.file(name)):
                raise BundleError(f"bundle {self.path} holds {name}, which its manifest doesn't list; export it again")

    def _token_map(self, relative: str) -> NDArray[np.int64]:
        vocab_size = self.manifest.model.vocab_size
        size = self.file(relative).stat().st_size
        if size != 4 * vocab_size:
            raise BundleError(
                f"token map {relative} holds {size} bytes, a vocabulary of {vocab_size} needs {4 * vocab_size}; "
                f"export again"
            )
        values = np.frombuffer(self.read_checked(relative), dtype="<i4").astype(np.int64)
        if (smallest := values.min()) < 0:
            raise BundleError(
                f"token map {relative} maps token {values.argmin()} to {smallest}, expected ids from 0; export again"
            )
        return values

    def _check_file(self, entry: FileEntry) -> None:
        status = plain_file(self.path, entry.path)
        if status.st_size != entry.bytes:
            raise BundleError(
                f"{entry.path} holds {status.st_size} bytes, the manifest says {entry.bytes}; export the bundle again"
            )


def plain_file(folder: Path, relative: str) -> os.stat_result:
    """Return the status of a file of a bundle; neither it nor a folder that it is in may be a link.

    Hard links are no links here: caches and ``cp -l`` make them, and they lead nowhere that a path could be changed to.

    Raises:
        BundleError: there is no such file, a link leads to it, or it is no plain file.
    """
    try:
        for parent in list(Path(relative).parents)[:-1]:
            if stat.S_ISLNK((folder / parent).lstat().st_mode):
                raise BundleError(f"{parent} in bundle {folder} is a link; bundles hold plain files only")
        status = (folder / relative).lstat()
    except OSError as error:
        raise BundleError(f"bundle {folder} lacks {relative}: {error.strerror}; export it again") from error
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{relative} in bundle {folder} is not a plain file")
    return status


def file_sha256(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := _read(file, path, DIGEST_BLOCK_BYTES):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def file_identity(path: Path) -> str:
    """Return the SHA-256 of a file's size and first 64 KiB: tells files apart without reading tables of gigabytes."""
    # Without O_NONBLOCK a pipe in place of the file would wait for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        head = _read(file, path, IDENTITY_BYTES)
        return hashlib.sha256(os.fstat(file.fileno()).st_size.to_bytes(8, "little") + head).hexdigest()


def _read(file: BinaryIO, path: Path, num_bytes: int) -> bytes:
    with naming(path):
        return file.read(num_bytes)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the bytes of ``engram.json``."""
    return sealed(manifest.to_dict())


def sealed(manifest: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest's file from the JSON object it holds, with a seal of them as its last key."""
    others = {key: value for key, value in manifest.items() if key != SEAL}
    data = (json.dumps(others | {SEAL: NO_DIGEST}, indent=1) + "\n").encode()
    return _reseal(data, NO_DIGEST, hashlib.sha256(data).hexdigest())


def _reseal(data: bytes, seal: str, other: str) -> bytes:
    before, _, after = data.rpartition(seal.encode())
    return before + other.encode() + after


def _check_seal(data: bytes, seal: object) -> None:
    """Refuse a manifest that isn't as it was written, to the last bit."""
    if not isinstance(seal, str) or not re.fullmatch("[0-9a-f]{64}", seal):
        raise BundleError(f"manifest.{SEAL} is {reprlib.repr(seal)}, expected 64 hexadecimal digits; export again")
    if (found := hashlib.sha256(_reseal(data, seal, NO_DIGEST)).hexdigest()) != seal:
        raise BundleError(f"the manifest has SHA-256 {found}, it says {seal}: it was damaged or changed; export again")


def _check_digest(entry: FileEntry, found: str) -> None:
    if found != entry.sha256:
        raise BundleError(f"{entry.path} has SHA-256 {found}, the manifest says {entry.sha256}; export again")
