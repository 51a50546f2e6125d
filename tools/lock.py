"""``python -m tools.lock [UV OPTION...]``: write ``locks/*.txt``: all packages of a development machine, with hashes.

What is locked stays as it is unless pyproject.toml or ``locks/extra.in`` no longer allows it, or an option says
otherwise, as ``--upgrade`` or ``--upgrade-package jinja2``. `make setup` installs nothing else.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "locks"
EXTRAS = ("export", "compile", "ort", "serve", "ray")
GROUPS = ("dev", "docs")
PYTHON = "3.11.5"  # pymdown-extensions, of the group docs, asks for it
HEAD = "# Written by `make lock` from pyproject.toml, locks/extra.in and locks/uv.toml: change those.\n"

# PyPI's wheels of torch for Linux need CUDA, 3 GB that nothing here uses. PyTorch's own index has builds without it. Of
# those, torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl is the one that CI has: the hash was taken of that file
# and never held against PyTorch's index, which can't be reached from there.
TORCH = "2.13.0"
TORCH_CPU_HASH = "sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"


def main(options: Sequence[str]) -> None:
    """Resolve and write the three files."""
    chosen = [f"--extra={name}" for name in EXTRAS] + [f"--group={name}" for name in GROUPS]
    compile_lock("development", ["--config-file=locks/uv.toml", *chosen, "pyproject.toml", "locks/extra.in"], options)
    add_hash(LOCKS / "development.txt", f"torch=={TORCH}", TORCH_CPU_HASH)
    known = [f"--no-emit-package={name}" for name in locked(LOCKS / "development.txt")]
    compile_lock("cuda", ["--no-config", *known, "--constraints=locks/development.txt", "-"], options)
    compile_lock("supply", ["--no-config", "--group=supply"], options)


def compile_lock(name: str, arguments: Sequence[str], options: Sequence[str]) -> None:
    """Have uv write a file of ``locks/``, for every operating system."""
    path = LOCKS / f"{name}.txt"
    line = ["build/supply/bin/uv", "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-header"]
    line += [
        f"--python-version={PYTHON}",
        "--no-annotate",
        f"--output-file={path.relative_to(ROOT)}",
        *arguments,
        *options,
    ]
    subprocess.run(line, cwd=ROOT, input=f"torch=={TORCH}\n", text=True, stdout=subprocess.DEVNULL, check=True)
    path.write_text(HEAD + path.read_text(encoding="utf-8").removeprefix(HEAD), encoding="utf-8")


def add_hash(path: Path, pin: str, digest: str) -> None:
    """Allow one more file for a pinned package."""
    if digest in path.read_text(encoding="utf-8"):
        return
    text, found = re.subn(
        rf"^({re.escape(pin)}\b.*)$", rf"\1\n    --hash={digest} \\", path.read_text(encoding="utf-8"), flags=re.M
    )
    if found != 1:
        raise SystemExit(f"{path} has {found} lines {pin}, not one: change TORCH in tools/lock.py and its hash")
    path.write_text(text, encoding="utf-8")


def locked(path: Path) -> list[str]:
    """Return the names of packages in a file."""
    return re.findall(r"^([A-Za-z0-9._-]+)==", path.read_text(encoding="utf-8"), flags=re.M)


if __name__ == "__main__":
    main(sys.argv[1:])
