"""What the README and the pages in ``docs/`` say can be typed, imported and opened, can be."""

import ast
import dataclasses
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import pytest
from tests.published import SCHEMA

from engram_export.calibration_report import CalibrationReport, LinearReport, RoleReport
from engram_export.verify import Parity
from engram_runtime.cli import cli
from engram_runtime.golden import Golden, TableGolden
from engram_runtime.library import LibraryInfo, PackedTensor
from engram_runtime.openai_api.chat_body import ChatBody
from engram_runtime.openai_api.completion_body import DEFAULT_MAX_TOKENS, MAX_TEXTS, CompletionBody
from engram_runtime.openai_api.generation_body import GenerationBody
from engram_runtime.openai_api.json_body import MAX_CONTAINERS, MAX_DEPTH, MAX_KEYS
from engram_runtime.server import limits
from engram_runtime.server.app import MOST_COUNTED
from engram_runtime.server.metrics import Metrics
from engram_runtime.server.models import Models
from engram_runtime.serving.options import DEFAULT_QUEUE, DEFAULT_SLOTS
from engram_runtime.serving.request import DEFAULT_TIME_LIMIT_S
from engram_targets.cpu import KERNEL_FAMILIES
from tools.command_reference import COMMANDS
from tools.pages import written_pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = written_pages()
DOCUMENTS: Mapping[str, str] = {
    path.name: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
    if path.name not in PAGES
}
README = DOCUMENTS["README.md"]


KEPT = (Golden, TableGolden, Parity, CalibrationReport, RoleReport, LinearReport, LibraryInfo, PackedTensor)


def found(pattern: str) -> list[str]:
    """Return what a pattern finds in all documents, each once."""
    return sorted({text for document in DOCUMENTS.values() for text in re.findall(pattern, document, re.MULTILINE)})


ROWS = re.findall(r"^\| `(engram[^`]*)` \|", README, re.MULTILINE)  # of the table of commands
LINES = found(r"^(?:    \$ )?(engram(?:-export)? [^#\n]*)$")  # in blocks of code
SPANS = found(r"`(engram(?:-export)? [^`\n]*)`")
OPTIONS = found(r"`(--[a-z0-9-]+)[^`\n]*`")
PATHS = found(r"`((?:assets|benchmarks|compilers|docs|examples|export|runtime|targets|tests|tools)/[\w./-]+)`")
LINKS = re.findall(r"\]\(([^)#:]+)\)", README)


def names(command: click.Command, name: str) -> Iterator[str]:
    """Yield the names of all commands that do something themselves."""
    if not isinstance(command, click.Group) or command.invoke_without_command:
        yield name
    if not isinstance(command, click.Group):
        return
    with click.Context(command) as context:
        for below in command.list_commands(context):
            yield from names(below_of(command, context, below), f"{name} {below}")


def below_of(group: click.Group, context: click.Context, name: str) -> click.Command:
    command = group.get_command(context, name)
    assert command is not None
    return command


def resolved(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the command that words begin with, and the rest of them; raises click.UsageError where there is none."""
    command, rest = COMMANDS[words[0]], words[1:]
    while isinstance(command, click.Group) and rest:
        with click.Context(command) as context:
            _, below, rest = command.resolve_command(context, rest)
        assert below is not None
        command = below
    return command, rest


def options_of(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def every_option() -> set[str]:
    lines = [name.split() for program, command in COMMANDS.items() for name in names(command, program)]
    return {option for words in lines for option in options_of(resolved(words)[0])}


@pytest.mark.parametrize("line", [*ROWS, *LINES])
def test_commands_in_the_documents_are_taken(line: str) -> None:
    command, words = resolved(shlex.split(line))
    command.make_context(None, words)


@pytest.mark.parametrize("span", SPANS)
def test_commands_in_sentences_exist_and_have_the_options(span: str) -> None:
    command, words = resolved(shlex.split(span))
    assert {word for word in words if word.startswith("-")} <= options_of(command)


def test_options_in_sentences_exist() -> None:
    assert set(OPTIONS) - every_option() == set()


def test_every_command_is_in_the_table_of_the_readme() -> None:
    assert [name for name in names(cli, "engram") if not any(f"{row} ".startswith(f"{name} ") for row in ROWS)] == []


@pytest.mark.parametrize("path", [*PATHS, *LINKS])
def test_files_in_the_documents_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_that_programs_in_the_documents_import_exist(document: str) -> None:
    for code in re.findall(r"```python\n(.*?)```", DOCUMENTS[document], re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                assert {alias.name for alias in node.names} <= set(module.__all__)


@pytest.mark.parametrize("name", PAGES)
def test_pages_written_from_code_are_those_of_this_code(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name], "run: python -m tools"


def test_the_page_on_the_format_names_every_key() -> None:
    parts = [SCHEMA, *(part for part in SCHEMA["$defs"].values() if "properties" in part)]
    keys = {key for part in parts for key in part["properties"]}
    assert keys - spans_of("bundle-format.md") == set()


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.__name__)
def test_the_page_on_the_format_names_every_key_of_other_files(kind: type) -> None:
    assert {field.name for field in dataclasses.fields(kind)} - spans_of("bundle-format.md") == set()


def test_the_page_on_the_format_names_every_value_there_is_to_choose_from() -> None:
    properties = [value for part in SCHEMA["$defs"].values() for value in part.get("properties", {}).values()]
    values = {value for schema in properties for value in schema.get("enum", [schema.get("const", "kind")])}
    assert values - spans_of("bundle-format.md") == set()


@pytest.mark.parametrize("body", [ChatBody, CompletionBody])
def test_the_page_on_the_server_names_every_field_of_a_request(body: type[GenerationBody]) -> None:
    assert {*body.IGNORED, *body.REFUSED} - spans_of("server.md") == set()
    assert {*body.model_fields} - set(re.findall(r"^\| `(\w+)` \|", PAGES["requests.md"], re.MULTILINE)) == set()


def test_the_page_on_the_server_names_every_metric() -> None:
    told = Metrics(Models([], 0)).text().decode()
    assert set(re.findall(r"^# TYPE (\w+)", told, re.MULTILINE)) - spans_of("server.md") == set()


def test_the_page_on_the_server_has_its_limits() -> None:
    rows = [
        f"| body | {limits.MAX_BODY_BYTES >> 20} MiB, {MAX_DEPTH} levels of JSON |",
        f"| headers | {limits.MAX_HEADER_BYTES >> 10} KiB, {limits.MAX_HEADERS} of them |",
        f"| time to send headers, body | {limits.HEADERS_S:.0f} s, {limits.BODY_S:.0f} s |",
        f"| time a client may leave what was sent unread | {limits.STALLED_READER_S:.0f} s |",
        f"| connections | {limits.MAX_CONNECTIONS} |",
        f"| texts at once, of each model | `--parallel`, {DEFAULT_SLOTS} by default; ",
        f"| waiting requests, of each model | `--queue`, {DEFAULT_QUEUE} by default; ",
        f"| end | on SIGTERM answers under way have {limits.DRAIN_S} s; ",
        f"| time for a text, in the queue included | {DEFAULT_TIME_LIMIT_S:.0f} s; ",
        f"| objects and lists of a body, keys of an object | {MAX_CONTAINERS:,}, {MAX_KEYS:,} |",
        f"| all bodies under way | {limits.MAX_HELD_BYTES >> 20} MiB; beyond that those above "
        f"{limits.LARGE_BODY_BYTES >> 10} KiB get 503 with `Retry-After`. ",
        f"by the kernel | {limits.SEND_BUFFER_BYTES >> 10} KiB a connection |",
        f"| text for `/tokenize` | some {MOST_COUNTED:,} tokens |",
        f"Prompts times `n` make {MAX_TEXTS} texts at most",
        f"a completion for {DEFAULT_MAX_TOKENS} tokens",
    ]
    assert [row for row in rows if row not in DOCUMENTS["server.md"]] == []


def test_the_page_on_targets_names_every_kernel_family() -> None:
    assert set(KERNEL_FAMILIES) - spans_of("adding-a-target.md") == set()


def spans_of(document: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", DOCUMENTS[document]))


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


def test_the_site_is_built_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    program = Path(sys.executable).with_name("zensical")
    done = subprocess.run([program, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "build" / "site" / "commands" / "index.html").exists()
