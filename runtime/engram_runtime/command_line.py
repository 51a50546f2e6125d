"""How every command of the project ends: its result, or one sentence and an exit code."""

import functools
import sys
import warnings
from collections.abc import Callable

import click

from engram_runtime.errors import OS_ERROR_EXIT_CODE, EngramError
from engram_runtime.terminal import harmless


def run_command(command: click.Command, name: str) -> None:
    """Run a click command; errors a user can act on become one line on stderr and their exit code, warnings a line."""
    run(command, name)


def run(program: Callable[[], object], name: str) -> None:
    """Run a program as `run_command` does a command."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(show_warning, name)
            program()
    except EngramError as error:
        _fail(f"{name}: {error}", error.exit_code)
    except OSError as error:
        places = [str(place) for place in (error.filename, error.filename2) if place]  # two of a copy or a rename
        reason = error.strerror or str(error)
        _fail(f"{name}: {': '.join([reason, *([' -> '.join(places)] if places else [])])}", OS_ERROR_EXIT_CODE)


def show_warning(name: str, message: Warning | str, *where: object, **more: object) -> None:
    click.echo(harmless(f"{name}: {message}"), err=True)


def _fail(message: str, exit_code: int) -> None:
    click.echo(harmless(message), err=True)
    sys.exit(exit_code)
