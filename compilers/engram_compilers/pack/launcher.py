#!/usr/bin/env python3
"""Run the engram of this folder: its own sources, packages from ``site/`` beside them or of this Python.

Older Pythons must be able to read this file, to be told which ones can run the rest.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DAMAGED, UNFIT = 3, 4  # exit codes, as those of engram
TEXTS = ("target", "machine", "system", "install")  # of what the folder says of itself


def packed() -> dict[str, Any]:
    """Return what the folder says of itself, or end where it doesn't."""
    path = HERE / "pack.json"
    try:
        pack = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        pack = None
    if not is_sound(pack):
        sys.stderr.write(f"engram: {path} is missing or damaged; copy the packed folder here again\n")
        sys.exit(DAMAGED)
    facts: dict[str, Any] = pack
    return facts


def is_sound(pack: Any) -> bool:
    """Say whether a folder's facts are all there and of their kinds."""
    if not isinstance(pack, dict) or not all(isinstance(pack.get(name), str) for name in TEXTS):
        return False
    pythons, modules, files = (pack.get(name) for name in ("pythons", "modules", "files"))
    if not isinstance(pythons, list) or not isinstance(modules, dict) or not isinstance(files, dict) or not pythons:
        return False
    kinds = [isinstance(python, str) for python in pythons]
    kinds += [isinstance(module, str) and module.isidentifier() for module in modules.values()]
    kinds += [isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int for entry in files.values()]
    return all(kinds) and not any("\0" in name for name in files)


def damage(pack: dict[str, Any]) -> str | None:
    """Name the first file that is not what was packed: by its digest where it is code, else by its size."""
    for name, (size, digest) in pack["files"].items():
        path = HERE / name
        if not path.is_file():
            return f"{path} is missing; copy the packed folder here again"
        if (found := path.stat().st_size) != size:
            return f"{path} holds {found} bytes, {size} were packed; copy the packed folder here again"
        if digest is not None and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return f"{path} is not what was packed; copy the packed folder here again"
    return None


def misfit(pack: dict[str, Any]) -> str | None:
    """Say why this machine or its Python can't run what is here."""
    machine, system = platform.machine(), platform.system().lower()
    if (machine, system) != (pack["machine"], pack["system"]):
        return (
            f"this folder is for {pack['target']}, {pack['system']} on {pack['machine']}, this machine is {system} on "
            f"{machine}; pack the bundle for it: engram pack BUNDLE --target NAME"
        )
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in pack["pythons"]:
        return (
            f"this is Python {python}, the folder's packages are for {' and '.join(pack['pythons'])}; start it by one "
            f"of those: python{pack['pythons'][0]} {HERE / 'engram'}"
        )
    lacking = [name for name, module in pack["modules"].items() if importlib.util.find_spec(module) is None]
    if lacking:
        return f"{' and '.join(lacking)} can't be found; run, in {HERE}: {pack['install']}"
    return None


def main() -> None:
    """Check what is here, then run the command."""
    pack = packed()
    folders = [str(HERE / "python"), str(HERE / "site")]
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # for processes that are started, as by engram bench
    for wrong, code in ((misfit(pack), UNFIT), (damage(pack), DAMAGED)):
        if wrong is not None:
            sys.stderr.write(f"engram: {wrong}\n")
            sys.exit(code)
    try:
        from engram_runtime.cli import main as run
    except ImportError as error:  # as by packages that were installed for another Python
        (first, *_) = str(error).strip().splitlines() or [type(error).__name__]
        sys.stderr.write(
            f"engram: a package can't be imported: {first}; run, in {HERE}, by the Python that runs it: "
            f"{pack['install']}\n"
        )
        sys.exit(UNFIT)
    run()


if __name__ == "__main__":
    main()
