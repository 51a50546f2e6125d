"""Ed25519 signatures of manifests and of libraries' descriptions, which hold the digests of everything else.

What is signed is a fixed text, what kind of file it is, and its SHA-256; a signature is a file beside it.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from engram_runtime.errors import BundleError, RequestError, TargetError
from engram_runtime.new_file import new_file
from engram_runtime.strict_json import Fields, read_json_object, version_error
from engram_runtime.trust.state import own_file, state_folder, write_own

try:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
except ModuleNotFoundError as error:
    raise TargetError("signatures need cryptography: pip install 'engram-edge[sign]'") from error

KEYS_FOLDER, VERSION = "keys", 1
KEY_SUFFIX, PUBLIC_SUFFIX = ".key", ".pub"
PURPOSE = b"engram-edge signature 1\0"
KEY_ID, SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")
MAX_KEY_BYTES = 1 << 14
NO_KEY = (ValueError, TypeError, UnsupportedAlgorithm)  # what loading one raises, TypeError where it has a passphrase


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """Who vouches for a file: the public key in hex, and the signature."""

    key: str
    signature: bytes

    @classmethod
    def read(cls, path: Path) -> Self:
        """Parse a file; raises BundleError naming the key."""
        fields = Fields(read_json_object(path), str(path))
        if (found := fields.count("version")) != VERSION:
            raise version_error(f"{path} has", found, VERSION, "sign again")
        key, signature = fields.take("key", str), fields.take("signature", str)
        fields.finish()
        if not KEY_ID.fullmatch(key) or not SIGNATURE.fullmatch(signature):
            raise BundleError(f"{path} holds no Ed25519 signature; sign again")
        return cls(key=key, signature=bytes.fromhex(signature))


def make_key(path: Path) -> str:
    """Write a new private key to ``path``, for its owner alone, and the public one beside it; returns the latter's id.

    Raises:
        RequestError: there is such a file.
    """
    public = path.with_name(path.name + PUBLIC_SUFFIX)
    for each in (path, public):
        if os.path.lexists(each):
            raise RequestError(f"{each} exists; choose another place")
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(text)
    with new_file(public, replace=False) as file:
        file.write(_public_pem(key.public_key()))
    return key_id(key.public_key())


def key_id(key: Ed25519PublicKey) -> str:
    """Return a public key's 32 bytes in hex."""
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Return the key in a file; raises RequestError where it holds none."""
    try:
        key = serialization.load_pem_private_key(_pem(path), password=None)
    except NO_KEY as error:
        raise RequestError(
            f"{path} holds no private key without a passphrase; make one with engram keys new"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RequestError(f"{path} holds a private key of another kind than Ed25519; make one with engram keys new")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Return the key in a file; raises RequestError where it holds none."""
    try:
        key = serialization.load_pem_public_key(_pem(path))
    except NO_KEY as error:
        raise RequestError(f"{path} holds no public key; engram keys new makes one beside each private key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise RequestError(f"{path} holds a public key of another kind than Ed25519; ask for one of that kind")
    return key


def sign(path: Path, kind: str, digest: str, key: Ed25519PrivateKey) -> None:
    """Write a signature of a digest to ``path``, in place of another one."""
    facts = {"version": VERSION, "key": key_id(key.public_key()), "signature": key.sign(_message(kind, digest)).hex()}
    with new_file(path, replace=True) as file:
        file.write((json.dumps(facts) + "\n").encode())


def signed_by(path: Path, kind: str, digest: str) -> str:
    """Return the id of the trusted key whose signature of a digest ``path`` holds.

    Raises:
        BundleError: there is none, or it holds no signature.
        TargetError: the key isn't trusted here, or the signature is not of that digest.
    """
    if not path.exists():
        raise BundleError(
            f"there is no signature {path}; ask who made it to run engram sign, or leave out --trust signed"
        )
    signature = Signature.read(path)
    if own_file(KEYS_FOLDER, signature.key) is None:
        raise TargetError(
            f"{path} is by key {signature.key}, which is not trusted here; if its owner is, run: engram trust KEY.pub"
        )
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
        public.verify(signature.signature, _message(kind, digest))
    except (InvalidSignature, ValueError) as error:
        raise TargetError(f"{path} is not a signature of what is there; have it signed again") from error
    return signature.key


def trust_key(path: Path) -> str:
    """Trust the owner of a public key from now on; returns its id."""
    key = read_public_key(path)
    write_own(KEYS_FOLDER, key_id(key), _public_pem(key))
    return key_id(key)


def forget_key(path: Path) -> bool:
    """Trust a key no longer; returns whether it was."""
    if (kept := own_file(KEYS_FOLDER, key_id(read_public_key(path)))) is None:
        return False
    kept.unlink()
    return True


def trusted_keys() -> list[str]:
    """Return the ids of the keys that are trusted here."""
    folder = state_folder() / KEYS_FOLDER
    return sorted(path.name for path in folder.iterdir() if KEY_ID.fullmatch(path.name)) if folder.is_dir() else []


def _message(kind: str, digest: str) -> bytes:
    return PURPOSE + kind.encode() + b"\0" + bytes.fromhex(digest)


def _public_pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_KEY_BYTES)
