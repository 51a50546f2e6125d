"""Errors of open files name them."""

import errno
from pathlib import Path

import pytest

from engram_runtime.named_errors import naming


@pytest.mark.parametrize(("told", "named"), [((errno.EIO, "bad"), "mine"), ((errno.EIO, "bad", "other"), "other")])
def test_an_error_without_a_name_gets_one(told: tuple[object, ...], named: str) -> None:
    with pytest.raises(OSError, match="bad") as caught, naming(Path("mine")):
        raise OSError(*told)
    assert caught.value.filename == named
