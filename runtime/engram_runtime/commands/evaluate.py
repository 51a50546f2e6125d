"""``engram eval``: quality figures of a bundle."""

from pathlib import Path

import click

from engram_runtime.errors import RequestError
from engram_runtime.lazy_group import LazyGroup

# name -> module:attribute
COMMANDS: dict[str, str] = {
    "ppl": "engram_runtime.commands.eval_ppl:ppl",
    "choices": "engram_runtime.commands.eval_choices:choices",
    "parity": "engram_runtime.commands.eval_parity:parity",
    "ablate": "engram_runtime.commands.eval_ablate:ablate_command",
}


@click.command(cls=LazyGroup, modules=COMMANDS)
def evaluate() -> None:
    """Measure the quality of a bundle; figures have 95 % intervals."""


def read_text(path: Path) -> str:
    """Read a UTF-8 text; raises RequestError naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"text {path} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"text {path} is not UTF-8 at byte {error.start}; convert it") from error
