"""Staged folders: whole at their place or not there at all, whatever happens in between."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engram_export.staging import staged_folder
from engram_runtime import new_folder
from engram_runtime.bundle import Bundle
from engram_runtime.disk_space import check_space
from engram_runtime.errors import BundleError, RequestError
from engram_runtime.exchange import exchange

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


def killed_export(out: Path) -> None:
    """Kill an export in its middle."""
    with subprocess.Popen([sys.executable, "-c", HALF_AN_EXPORT, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def refuse_to_write() -> None:
    raise AssertionError("a finished file is written again")


def killed_at(place: Path) -> Callable[[Path], None]:
    def flush(path: Path) -> None:
        if path == place:
            raise StoppedError

    return flush


def cannot_swap(one: Path, other: Path) -> bool:
    return False


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
    monkeypatch.setattr(new_folder, "exchange", cannot_swap)
    with pytest.raises(PermissionError):
        export(tmp_path / "out", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == OLD


def test_a_bundle_is_replaced_where_names_cannot_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_folder, "exchange", cannot_swap)
    write_bundle(tmp_path / "out", "old")
    export(tmp_path / "out", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(tmp_path / "out") == NEW


def test_names_are_swapped_in_one_step(tmp_path: Path) -> None:
    write_bundle(tmp_path / "one", "old")
    write_bundle(tmp_path / "other", "new")
    if exchange(tmp_path / "one", tmp_path / "other"):
        assert (tree(tmp_path / "one"), tree(tmp_path / "other")) == (NEW, OLD)
    else:
        assert (tree(tmp_path / "one"), tree(tmp_path / "other")) == (OLD, NEW)


def test_names_that_are_not_there_cannot_be_swapped(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        exchange(tmp_path / "one", tmp_path / "other")
    assert caught.value.filename == str(tmp_path / "one")


def test_the_old_bundle_is_whole_until_the_new_name_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may take back the new name, and then the old bundle must be there."""
    write_bundle(tmp_path / "out", "old")
    found = []
    monkeypatch.setattr(new_folder, "flush", lambda path: found.append(tree(path)) if path == tmp_path else None)
    export(tmp_path / "out", replace=True)
    (at_the_end,) = found
    assert {f".out.partial/bundle/{name}": text for name, text in OLD.items()}.items() <= at_the_end.items()


def test_a_bundle_that_was_replaced_when_the_export_was_killed_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(text: str) -> None:
        with staged_folder(tmp_path / "out", "same", replace=True) as journal:
            write_bundle(journal.folder, text)
            for name in ("engram.json", "graph/decoder.onnx"):
                journal.once(journal.folder / name, lambda: None, lambda count: None)

    noted("old")
    monkeypatch.setattr(new_folder, "flush", killed_at(tmp_path))
    with pytest.raises(StoppedError):
        noted("new")
    monkeypatch.undo()
    assert tree(tmp_path / "out") == NEW
    assert tree(tmp_path / ".out.partial" / "bundle") == OLD
    with staged_folder(tmp_path / "out", "same", replace=True) as journal:
        assert (journal.kept, tree(journal.folder)) == (frozenset(), {})
        write_bundle(journal.folder, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
        place, who = tmp_path / "out", os.getpid()
        expected = f"{place} is being exported to by process {who}; wait for it or choose another place"
        assert refusal(tmp_path / "out", replace=True) == expected
        write_bundle(journal.folder, "new")
    assert tree(tmp_path / "out") == NEW


def no_space(folder: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing_and_says_what_is_needed(tmp_path: Path) -> None:
    killed_export(tmp_path / "out")
    with (
        pytest.raises(RequestError) as caught,
        staged_folder(tmp_path / "out", "same", replace=False, num_bytes=12345) as journal,
    ):
        no_space(journal.folder)
    assert str(caught.value) == (
        f"no space to write {tmp_path / 'out'}: at least 12,345 bytes are needed, no space left on device; free some "
        f"or choose another place"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    killed_export(tmp_path / "out")
    needed = 1 << 60
    with pytest.raises(RequestError) as caught, staged_folder(tmp_path / "out", "same", replace=False) as journal:
        check_space(tmp_path / "out", needed)
    start = f"no space to write {tmp_path / 'out'}: at least {needed:,} bytes are needed, "
    assert str(caught.value).startswith(start)
    assert tree(journal.folder) == {"whole": "whole"}  # for when there is space


def test_a_write_that_fails_is_said_to_be_at_the_place(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="Input/output error") as caught,
        staged_folder(tmp_path / "out", "same", replace=False),
    ):
        raise OSError(errno.EIO, "Input/output error")
    assert caught.value.filename == str(tmp_path / "out")
