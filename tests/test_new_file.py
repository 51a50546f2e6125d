"""Files appear whole or not at all, and take nobody's place unasked."""

import os
from pathlib import Path

import pytest

from engram_runtime.errors import RequestError
from engram_runtime.new_file import check_place, new_file


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
