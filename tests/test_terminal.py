"""What models and files say reaches a terminal as text alone."""

import io
import sys

import click
import pytest

from engram_runtime.command_line import run
from engram_runtime.errors import BundleError
from engram_runtime.terminal import harmless, show

RETITLE = "a\x1b]0;owned\x07b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_but_tab_and_line_feed_are_replaced() -> None:
    kept = {chr(code) for code in range(0x110000) if harmless(chr(code)) == chr(code)}
    changed = {chr(code) for code in (*range(0x20), *range(0x7F, 0xA0))} - {"\t", "\n"}
    assert kept == {chr(code) for code in range(0x110000)} - changed
    assert harmless("one\r\ntwo\x9b2J") == "one\ntwo\ufffd2J"


def test_a_terminal_gets_harmless_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    show(RETITLE)
    assert isinstance(sys.stdout, Terminal)
    assert sys.stdout.getvalue() == "a\ufffd]0;owned\ufffdb\n"


def test_a_pipe_gets_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    show("one\r\ntwo\x07", nl=False)
    assert capsys.readouterr().out == "one\r\ntwo\x07"


def test_errors_are_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def fails() -> None:
        raise BundleError(f"{RETITLE} is missing")

    with pytest.raises(SystemExit):
        run(lambda: fails(standalone_mode=False, args=[]), "engram")
    assert capsys.readouterr().err == "engram: a\ufffd]0;owned\ufffdb is missing\n"
