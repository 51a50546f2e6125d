"""Staged folders: whole at their place or not there at all, whatever happens in between."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engram_export.staging import staged_folder
from engram_runtime.bundle import Bundle
from engram_runtime.errors import BundleError, RequestError

# An export that has written half of its files when it waits to be killed.
HALF_AN_EXPORT = """
import sys, time
from pathlib import Path
from engram_export.staging import staged_folder

with staged_folder(Path(sys.argv[1]), "same", replace=True) as journal:
    (journal.folder / "whole").write_bytes(b"whole")
    journal.once(journal.folder / "whole", lambda: None, lambda count: None)
    (journal.folder / "graph").mkdir()
    (journal.folder / "graph" / "decoder.onnx").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
"""


class StoppedError(Exception):
    """What goes wrong in the middle of an export."""


def write_bundle(folder: Path, text: str) -> None:
    """Write a folder that counts as a bundle, as a finished export does."""
    (folder / "graph").mkdir(parents=True)
    (folder / "graph" / "decoder.onnx").write_text(text)
    (folder / "engram.json").write_text(text)


def tree(folder: Path) -> dict[str, str | None]:
    """Return the text of every file below a folder, and None for the folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def export(out: Path, text: str = "new", *, replace: bool = False) -> None:
    with staged_folder(out, "same", replace=replace) as journal:
        write_bundle(journal.folder, text)


def stopped_export(out: Path, error: type[BaseException] = StoppedError) -> None:
    with staged_folder(out, "same", replace=True) as journal:
        write_bundle(journal.folder, "new")
        raise error


def refusal(out: Path, *, replace: bool) -> str:
    with pytest.raises(RequestError) as caught:
        export(out, replace=replace)
    return str(caught.value)


def killed_export(out: Path) -> int:
    """Kill an export in its middle and return the id its process had."""
    with subprocess.Popen([sys.executable, "-c", HALF_AN_EXPORT, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return process.pid


def refuse_to_write() -> None:
    raise AssertionError("a finished file is written again")


def opens(folder: Path) -> bool:
    try:
        Bundle.open(folder)
    except BundleError:
        return False
    return True


NEW = {"engram.json": "new", "graph": None, "graph/decoder.onnx": "new"}
OLD = {"engram.json": "old", "graph": None, "graph/decoder.onnx": "old"}


def test_what_was_written_is_at_its_place_and_nothing_beside_it(tmp_path: Path) -> None:
    export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == NEW


def test_folders_above_the_place_are_made(tmp_path: Path) -> None:
    export(tmp_path / "a" / "b" / "out")
    assert tree(tmp_path / "a" / "b" / "out") == NEW


def test_the_place_is_empty_until_the_end(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", "same", replace=False) as journal:
        assert list(journal.folder.iterdir()) == []
        assert not (tmp_path / "out").exists()


def test_everything_is_on_the_disk_before_it_is_at_its_place_and_the_place_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[str, bool]] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append((path.name, (tmp_path / "out").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    export(tmp_path / "out")
    before = {(name, False) for name in ("journal.jsonl", "engram.json", "graph", "decoder.onnx", "bundle")}
    assert (set(flushed[:-1]), flushed[-1]) == (before, (tmp_path.name, True))


@pytest.mark.parametrize("error", [StoppedError, KeyboardInterrupt])
def test_nothing_is_left_of_an_export_that_finished_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        stopped_export(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_stays_as_it_was_if_its_replacement_fails(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "old")
    with pytest.raises(StoppedError):
        stopped_export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == OLD


def test_a_bundle_is_not_replaced_unasked(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "old")
    expected = f"{tmp_path / 'out'} is a bundle already; replace it with --force or choose another place"
    assert refusal(tmp_path / "out", replace=False) == expected
    assert tree(tmp_path / "out") == OLD


def test_a_bundle_is_replaced_when_asked(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "old")
    (tmp_path / "out" / "leftover").write_text("old")
    export(tmp_path / "out", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == NEW


def test_a_bundle_is_put_back_if_its_replacement_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "out", "old")
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path.name == "bundle":
            raise PermissionError
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(PermissionError):
        export(tmp_path / "out", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == OLD


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "make", [Path.mkdir, Path.touch, lambda path: write_bundle(path / "inside", "old")], ids=["empty", "file", "folder"]
)
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, make: Callable[[Path], None], replace: bool) -> None:
    make(tmp_path / "out")
    before = tree(tmp_path)
    expected = f"{tmp_path / 'out'} exists and is not a bundle; choose another place"
    assert refusal(tmp_path / "out", replace=replace) == expected
    assert tree(tmp_path) == before


def test_a_killed_export_leaves_nothing_that_opens(tmp_path: Path) -> None:
    killed_export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir() if opens(path)] == []


def test_a_bundle_stays_as_it_was_if_its_replacement_is_killed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "old")
    killed_export(tmp_path / "out")
    assert tree(tmp_path / "out") == OLD


def test_the_next_export_takes_over_what_a_killed_one_had_finished(tmp_path: Path) -> None:
    killed_export(tmp_path / "out")
    finished = tmp_path / ".out.partial" / "bundle" / "whole"
    inode = finished.stat().st_ino
    with staged_folder(tmp_path / "out", "same", replace=False) as journal:
        assert tree(journal.folder) == {"whole": "whole"}
        journal.once(finished, refuse_to_write, lambda count: None)
    assert (tmp_path / "out" / "whole").stat().st_ino == inode
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_next_export_of_something_else_clears_up_after_a_killed_one(tmp_path: Path) -> None:
    killed_export(tmp_path / "out")
    with staged_folder(tmp_path / "out", "other", replace=False) as journal:
        assert (journal.dropped, tree(journal.folder)) == (True, {})
        write_bundle(journal.folder, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == NEW


def test_an_error_of_ours_leaves_nothing_even_of_what_is_finished(tmp_path: Path) -> None:
    killed_export(tmp_path / "out")
    with pytest.raises(RequestError), staged_folder(tmp_path / "out", "same", replace=False):
        raise RequestError
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_keeps_what_a_killed_one_had_finished(tmp_path: Path) -> None:
    write_bundle(tmp_path / "out", "old")
    killed_export(tmp_path / "out")
    before = tree(tmp_path)
    refusal(tmp_path / "out", replace=False)
    assert tree(tmp_path) == before


def test_two_exports_to_one_place_are_refused(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", "same", replace=False) as journal:
        expected = f"{tmp_path / 'out'} is being exported to by another process; wait for it or choose another place"
        assert refusal(tmp_path / "out", replace=True) == expected
        write_bundle(journal.folder, "new")
    assert tree(tmp_path / "out") == NEW
