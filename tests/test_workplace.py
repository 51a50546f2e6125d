"""One process at a time makes what will be at a place, and what a killed one left is removed."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from engram_runtime.batch.output_file import OutputFile
from engram_runtime.command_line import run_command
from engram_runtime.disk_space import written_to
from engram_runtime.errors import RequestError
from engram_runtime.new_file import new_file
from engram_runtime.new_folder import new_folder, staged_place
from engram_runtime.workplace import holder

WAITING = """
import sys
from pathlib import Path
from engram_runtime.new_folder import staged_place
with staged_place(Path(sys.argv[1]), "made") as folder:
    (folder / "half").touch()
    print("half", flush=True)
    sys.stdin.read()
"""


def waiting(place: Path) -> "subprocess.Popen[bytes]":
    """Start a process that has the workplace of a place until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", WAITING, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    return process


def test_the_process_at_a_place_is_told_and_what_it_leaves_is_removed(tmp_path: Path) -> None:
    with waiting(tmp_path / "out") as process:
        with pytest.raises(RequestError) as caught, staged_place(tmp_path / "out", "made"):
            pass
        process.kill()
    assert str(caught.value) == (
        f"{tmp_path / 'out'} is being made by process {process.pid}; wait for it or choose another place"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    with staged_place(tmp_path / "out", "made") as folder:
        (folder / "whole").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]


def test_a_file_nobody_has_locked_has_no_holder(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert holder(file) is None


def test_a_folder_without_space_says_what_it_needs(tmp_path: Path) -> None:
    with (
        pytest.raises(RequestError) as caught,
        new_folder(tmp_path / "out", "mark", "a folder", replace=False, num_bytes=1000),
    ):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert str(caught.value) == (
        f"no space to write {tmp_path / 'out'}: at least 1,000 bytes are needed, disk quota exceeded; free some or "
        f"choose another place"
    )
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_a_disk_keep_the_name_they_have(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="x") as caught, written_to(tmp_path):
        raise OSError(errno.EIO, "x", "inside")
    assert caught.value.filename == "inside"


def test_a_file_removes_what_a_killed_process_left_of_it(tmp_path: Path) -> None:
    (tmp_path / ".a.1234.tmp").touch()
    (tmp_path / ".ab.1234.tmp").touch()
    with new_file(tmp_path / "a", replace=False) as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ab.1234.tmp", "a"]


def test_answers_that_find_no_space_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = OutputFile(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError) as caught:
        output.close()
    expected = f"no space to write {tmp_path / 'out'}: no space left on device; free some or choose another place"
    assert str(caught.value) == expected


def test_an_error_of_a_copy_names_both_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy() -> None:
        raise OSError(errno.EIO, "Input/output error", "source", None, "target")

    monkeypatch.setattr(sys, "argv", ["engram"])
    with pytest.raises(SystemExit) as caught:
        run_command(click.Command("engram", callback=copy), "engram")
    assert (caught.value.code, capsys.readouterr().err) == (3, "engram: Input/output error: source -> target\n")
