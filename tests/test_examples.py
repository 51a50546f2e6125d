"""The short programs in ``examples/`` do what they say, as their first lines say that they are called."""

import ast
import json
import runpy
import sys
from pathlib import Path

import pytest
from tests.served import served
from tests.workshop import Workshop

from engram_runtime import LLM
from engram_runtime.serving.opening import open_engine
from engram_runtime.serving.options import EngineOptions

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = [path for path in sorted(EXAMPLES.glob("*.py")) if path.name != "demo.py"]
PROMPT = "The tide comes in"


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Printed":
    return Printed(monkeypatch, capsys)


class Printed:
    """Runs an example as a program and returns the lines it prints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, name: str, *arguments: object) -> list[str]:
        self._monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_module(f"examples.{name}", run_name="__main__")
        return self._capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_called(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert f"python -m examples.{path.stem} " in str(ast.get_docstring(ast.parse(text)))


def test_generate_prints_a_text_and_what_it_took(workshop: Workshop, printed: Printed) -> None:
    *text, took, rows = printed("generate", workshop.ready().path, PROMPT)
    assert text
    assert " a second, the first after " in took
    assert rows.startswith("layer_1: ")


def test_table_activity_has_a_line_for_each_token(workshop: Workshop, printed: Printed) -> None:
    lines = printed("table_activity", workshop.ready().path, PROMPT)
    pieces = [ast.literal_eval(line.split("%  ")[1]) for line in lines]
    assert "".join(pieces) == PROMPT
    assert {line.split()[0] for line in lines} == {"layer_1"}


def test_prompts_are_answered_line_by_line(workshop: Workshop, printed: Printed, tmp_path: Path) -> None:
    bundle = workshop.ready().path
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{PROMPT} twice\n{'tide ' * 500}\n")
    first, second, third = map(json.loads, printed("prompts", bundle, tmp_path / "prompts.txt"))
    with LLM(bundle) as llm:
        assert [first["text"], second["text"]] == [
            llm.generate(prompt, max_tokens=32, stop=("\n",)).text for prompt in (PROMPT, f"{PROMPT} twice")
        ]
    assert "context" in third["error"]


def test_the_openai_client_streams_an_answer_and_prints_what_tables_did(workshop: Workshop, printed: Printed) -> None:
    with open_engine(workshop.ready().path, options=EngineOptions(slots=1)) as engine, served(engine) as url:
        *text, took, rows = printed("openai_client", f"{url}/v1", "What comes in twice a day?")
    assert text
    assert took.endswith(" before them")
    assert rows.startswith("layer_1: ")
