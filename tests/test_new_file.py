"""Files appear whole or not at all, and take nobody's place unasked."""

import os
from pathlib import Path

import pytest

from engram_runtime.errors import RequestError
from engram_runtime.new_file import check_place, new_file
from engram_runtime.workplace import locked_workplace, workplace


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with new_file(path, replace=False) as file:
        file.write(b"whole")
        assert not path.exists()
    assert (path.read_bytes(), names(tmp_path)) == (b"whole", ["a"])


def test_others_may_read_it_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with new_file(tmp_path / "a", replace=False):
        pass
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def interrupted(path: Path, error: type[BaseException]) -> None:
    with new_file(path, replace=True) as file:
        file.write(b"half")
        raise error


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(error):
        interrupted(tmp_path / "a", error)
    assert ((tmp_path / "a").read_bytes(), names(tmp_path)) == (b"before", ["a"])


def test_a_file_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.symlink_to("nowhere")
    with pytest.raises(RequestError) as caught:
        check_place(path, replace=False)
    assert str(caught.value) == f"{path} exists; replace it with --force or choose another place"
    with new_file(path, replace=True) as file:
        file.write(b"new")
    assert (path.read_bytes(), path.is_symlink()) == (b"new", False)


@pytest.mark.parametrize("replace", [False, True])
def test_places_for_no_file_are_refused(tmp_path: Path, replace: bool) -> None:
    with pytest.raises(RequestError) as caught:
        check_place(tmp_path, replace=replace)
    assert str(caught.value) == f"{tmp_path} is a folder; give the name of a file"
    with pytest.raises(RequestError) as caught:
        check_place(tmp_path / "no" / "a", replace=replace)
    assert str(caught.value) == (f"there is no folder {tmp_path / 'no'} to write a to; make it or choose another place")


def test_devices_stay_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to(os.devnull)
    for path in (tmp_path / "pipe", tmp_path / "null"):
        with pytest.raises(RequestError) as caught:
            check_place(path, replace=True)
        assert str(caught.value) == f"{path} is not a plain file; give the name of one"


def test_a_name_alone_is_in_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with new_file(Path("a"), replace=False) as file:
        file.write(b"here")
    assert Path("a").read_bytes() == b"here"


def test_a_link_in_place_of_the_unfinished_file_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"mine")
    place = tmp_path / "shared"
    place.mkdir()
    (place / f".a.{os.getpid()}.tmp").symlink_to(tmp_path / "own")
    with pytest.raises(FileExistsError):
        interrupted(place / "a", OSError)
    assert ((tmp_path / "own").read_bytes(), names(place)) == (b"mine", [f".a.{os.getpid()}.tmp"])


def test_a_pipe_beside_a_file_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.1.tmp")
    with new_file(tmp_path / "a", replace=False) as file:
        file.write(b"whole")
    assert names(tmp_path) == ["a"]


def test_a_workplace_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_bytes(b"mine")
    theirs = workplace(tmp_path / "out")
    theirs.mkdir()
    (theirs / "journal.jsonl").symlink_to(tmp_path / "own")
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    with pytest.raises(RequestError) as caught:
        lock(tmp_path / "out")
    assert str(caught.value) == f"{theirs} is no folder of this user's; remove it or choose another place"
    assert (tmp_path / "own").read_bytes() == b"mine"


def test_a_link_in_place_of_a_workplace_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    workplace(tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError):
        lock(tmp_path / "out")
    assert names(tmp_path / "elsewhere") == []


def test_a_workplace_that_vanishes_was_another_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engram_runtime.workplace._make_own", lambda folder: None)
    with pytest.raises(RequestError) as caught:
        lock(tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path / 'out'} is being exported to by another process; wait for it or choose another place"
    )


def lock(out: Path) -> None:
    with locked_workplace(out, "exported to"):
        pass
