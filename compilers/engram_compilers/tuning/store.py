"""Measured block sizes in the user's cache folder, a file for each target, processor and compiler."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from engram_compilers.tuning.sizes import KINDS, LEAST_SUMS, MOST_SUMS, OWN_BLOCKS, Blocks, BlockSize
from engram_runtime.cpu import cpu_name, machine, usable_cpu_flags
from engram_runtime.errors import BundleError, CompileError
from engram_runtime.new_file import new_file
from engram_runtime.strict_json import Fields, read_json_object
from engram_runtime.user_cache import cache_folder
from engram_targets import CpuProfile
from engram_targets.common import MOST_TOKENS

FOLDER, VERSION = "tuning", 1
COMPILERS = ("engram-edge", "apache-tvm", "apache-tvm-ffi")


def digest_of(profile: CpuProfile) -> str:
    """Return what tells measurements apart: the profile's code, this machine's processor, the compiler's versions."""
    facts = [
        [profile.kernels, profile.llvm.target],
        [machine(), cpu_name(), sorted(usable_cpu_flags())],
        [version(name) for name in COMPILERS],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def place_of(profile: CpuProfile) -> Path:
    """Return the file for a profile on this machine, which may not exist."""
    return cache_folder() / FOLDER / f"{profile.name}-{digest_of(profile)}.json"


def keep(profile: CpuProfile, sizes: tuple[BlockSize, ...]) -> Path:
    """Write what was measured of a profile on this machine; returns the file."""
    path = place_of(profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [{"kind": size.kind, "rows": size.rows, "sums": size.sums} for size in sizes]
    with new_file(path, replace=True) as file:
        file.write(json.dumps({"version": VERSION, "sizes": found}).encode())
    return path


def kept_blocks(profile: CpuProfile) -> Blocks:
    """Return what was measured of a profile on this machine, the family's own block sizes where nothing was.

    Raises:
        CompileError: the file is damaged.
    """
    try:
        path = place_of(profile)
    except OSError:  # this user has no folder for caches, so nothing was kept
        return OWN_BLOCKS
    if not path.exists():
        return OWN_BLOCKS
    try:
        sizes = _parsed(Fields(read_json_object(path), str(path)))
    except BundleError as error:
        raise CompileError(f"{error}; delete it or run: engram tune --target {profile.name}") from error
    return Blocks(source=f"engram tune {digest_of(profile)}", sizes=sizes) if sizes else OWN_BLOCKS


def _parsed(fields: Fields) -> tuple[BlockSize, ...]:
    found = fields.take("version", int)
    if found != VERSION:
        raise BundleError(f"block sizes have version {found}, this version reads {VERSION}")
    sizes = tuple(_size(item) for item in fields.objects("sizes"))
    fields.finish()
    return sizes


def _size(fields: Fields) -> BlockSize:
    size = BlockSize(kind=fields.take("kind", str), rows=fields.take("rows", int), sums=fields.take("sums", int))
    fields.finish()
    sound = size.kind in KINDS and 1 <= size.rows <= MOST_TOKENS and LEAST_SUMS <= size.sums <= MOST_SUMS
    if not sound:
        raise BundleError(f"block size {size} can't be")
    return size
