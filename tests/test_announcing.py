"""What is said of tables as they are opened, and the terminal that is left behind."""

import contextlib
import io

import click
import pytest

from engram_runtime.commands import announcing
from engram_runtime.commands.announcing import announce_table
from engram_runtime.errors import TableError
from engram_runtime.tables.options import RESIDENT
from engram_runtime.tables.policy import TableChoice

CHOICE = TableChoice(site="layer_1", io=RESIDENT, table_bytes=100, reason="as asked for", room_bytes=1000)
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    """Keeps what is written to a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _bars_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcing, "QUIET_S", 0)


def load(stderr: io.StringIO, *pieces: int, error: BaseException | None = None) -> None:
    """Load a table as a command does."""
    with contextlib.redirect_stderr(stderr), click.Context(click.Command("run")):
        progress = announce_table(CHOICE)
        for piece in pieces:
            progress(piece)
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TableError("a file is cut short")])
def test_loading_that_is_interrupted_leaves_a_cursor(error: BaseException) -> None:
    terminal = Terminal()
    with pytest.raises(type(error)):
        load(terminal, 40, error=error)
    shown = terminal.getvalue()
    assert HIDE_CURSOR in shown
    assert shown.endswith(f"{SHOW_CURSOR}\n")


def test_a_table_is_announced_and_its_bar_ends_once() -> None:
    terminal = Terminal()
    load(terminal, 40, 60)
    shown = terminal.getvalue()
    assert shown.startswith("table layer_1: resident, 100 B: as asked for\n")
    assert (shown.count(SHOW_CURSOR), "100%" in shown) == (1, True)


@pytest.mark.parametrize(("quiet_s", "bar"), [(60, ""), (0, "loading layer_1\n")])
def test_a_progress_bar_is_for_what_takes_a_while(monkeypatch: pytest.MonkeyPatch, quiet_s: float, bar: str) -> None:
    monkeypatch.setattr(announcing, "QUIET_S", quiet_s)
    file = io.StringIO()
    load(file, 40, 60)
    assert file.getvalue() == f"table layer_1: resident, 100 B: as asked for\n{bar}"


def test_a_table_that_is_not_loaded_has_no_bar() -> None:
    terminal = Terminal()
    load(terminal)
    assert terminal.getvalue() == "table layer_1: resident, 100 B: as asked for\n"
