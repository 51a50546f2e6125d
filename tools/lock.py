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
EXTRAS = ("export", "compile", "ort", "serve", "ray", "sign")
GROUPS = ("dev", "docs")
PYTHON = "3.11.5"  # pymdown-extensions, of the group docs, asks for it
HEAD = "# Written by `make lock` from pyproject.toml, locks/extra.in and locks/uv.toml: change those.\n"

TORCH = "torch==2.13.0"  # locks/torch-cpu.txt has another build of the same version, by hand


def main(options: Sequence[str]) -> None:
    """Resolve and write three files: everything but torch, torch and the CUDA packages that PyPI's needs, our tools."""
    chosen = [f"--extra={name}" for name in EXTRAS] + [f"--group={name}" for name in GROUPS]
    asked = ["--no-emit-package=torch", "pyproject.toml", "locks/extra.in"]
    compile_lock("development", ["--config-file=locks/uv.toml", *chosen, *asked], options)
    known = [f"--no-emit-package={name}" for name in locked(LOCKS / "development.txt")]
    compile_lock("torch", ["--no-config", *known, "--constraints=locks/development.txt", "-"], options)
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
    subprocess.run(line, cwd=ROOT, input=TORCH, text=True, stdout=subprocess.DEVNULL, check=True)
    path.write_text(HEAD + path.read_text(encoding="utf-8").removeprefix(HEAD), encoding="utf-8")


def locked(path: Path) -> list[str]:
    """Return the names of packages in a file."""
    return re.findall(r"^([A-Za-z0-9._-]+)==", path.read_text(encoding="utf-8"), flags=re.M)


if __name__ == "__main__":
    main(sys.argv[1:])
