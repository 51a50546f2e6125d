"""Shell completion: the script that a shell reads, and what click answers it."""

import re

import pytest
from tests.conftest import Command

from engram_runtime.commands.completion import SHELLS

ASKED_BY = {"engram": "_ENGRAM_COMPLETE", "engram-export": "_ENGRAM_EXPORT_COMPLETE"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_asks_each_program_by_its_own_variable(command: Command, shell: str) -> None:
    outcome = command("engram", "completion", shell)
    assert outcome.code == 0
    assert set(re.findall(rf"(\w+)={shell}_complete", outcome.out)) == set(ASKED_BY.values())
    for program in ASKED_BY:
        assert re.search(rf"(complete|compdef) .*{program}\b", outcome.out)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["engram", "ba"], ["batch"]),
        (["engram", "tables", "w"], ["warm", "why"]),
        (["engram", "run", "demo.engram", "hello", "--executor", "t"], ["tvm"]),
        (["engram", "run", "--temp"], ["--temperature"]),
        (["engram-export", "--quant", "int"], ["int8", "int4"]),
    ],
)
def test_programs_complete_commands_options_and_choices(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str], completed: list[str]
) -> None:
    monkeypatch.setenv(ASKED_BY[words[0]], "bash_complete")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    outcome = command(words[0])
    kinds, values = zip(*(line.split(",") for line in outcome.out.splitlines()), strict=True)
    assert (outcome.code, set(kinds), sorted(values)) == (0, {"plain"}, sorted(completed))


def test_an_unknown_shell_is_refused(command: Command) -> None:
    outcome = command("engram", "completion", "tcsh")
    assert outcome.code == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in outcome.err
