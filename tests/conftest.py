"""Fixtures that several test files share."""

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.spared import remember_traces, spare_repetitions
from tests.workshop import Workshop

from engram_export import cli as export_cli
from engram_runtime import cli as runtime_cli

spare_repetitions()
remember_traces()

HOMES = ("XDG_STATE_HOME", "XDG_RUNTIME_DIR")  # of the developer's own records, keys and locks
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # which has been given what the first process has
# The longest, first: a long file that begins last is waited for by one process alone.
LONG_FILES = (
    "test_compile",
    "test_draft_head",
    "test_kernels",
    "test_drafted_bundles",
    "test_attention",
    "test_export",
    "test_group",
    "test_pack",
    "test_families",
    "test_activity",
    "test_arm_kernels",
    "test_amx",
    "test_standalone",
    "test_streaming",
    "test_staging",
    "test_calibration",
    "test_npu_bundles",
    "test_gpu_library",
    "test_c_pack",
    "test_expert_kernels",
)
MAINS = {"engram": runtime_cli.main, "engram-export": export_cli.main}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on stdout."""
        return json.loads(self.out)


Command = Callable[..., Outcome]


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of this run that all its processes have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if IS_WORKER else own


def pytest_configure(config: pytest.Config) -> None:
    """Give all tests and what they start folders of their own for what belongs to a user."""
    if not IS_WORKER:
        root = Path(tempfile.mkdtemp(prefix="engram-tests-"))
        for name in HOMES:
            os.environ[name] = str(root / name)
            (root / name).mkdir(mode=0o700)
        config.add_cleanup(lambda: shutil.rmtree(root))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long files first."""
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Tiny checkpoints and bundles, each made once, by whichever process needs it first."""
    return Workshop(shared_folder(tmp_path_factory) / "workshop")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command of the project as its script would, in this process: name, arguments, text for stdin."""

    def run(name: str, *arguments: object, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code: object = 0
        try:
            MAINS[name]()
        except SystemExit as exit_:
            code = exit_.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)

    return run
