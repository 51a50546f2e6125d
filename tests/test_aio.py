"""Direct reads: as many as asked for, of the file's own blocks, and what refuses them is named."""

import errno
import os
import platform
import re
from pathlib import Path

import numpy as np
import pytest

from engram_runtime.tables import aio
from engram_runtime.tables.aio import BLOCK_BYTES, DirectReader

BLOCKS = 9


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of `BLOCKS` blocks and a bit, block i full of i, on a disk that reads directly."""
    path = tmp_path / "rows"
    path.write_bytes(b"".join(bytes([i]) * BLOCK_BYTES for i in range(BLOCKS)) + b"!")
    try:
        DirectReader(path, 1).close()
    except OSError as error:
        pytest.skip(f"no direct reads here: {error}")
    return path


@pytest.mark.parametrize("depth", [1, 4, 64])
def test_every_read_is_made_once_whatever_the_depth(file: Path, depth: int) -> None:
    offsets = np.random.default_rng(0).integers(0, BLOCKS * BLOCK_BYTES, 50)
    with DirectReader(file, depth) as reader:
        times = reader.read(offsets)
    assert times.latencies_s.shape == (50,)
    assert (times.latencies_s > 0).all()
    assert times.latencies_s.max() <= times.elapsed_s


def test_a_read_fills_the_buffer_with_the_block_around_its_place(file: Path) -> None:
    with DirectReader(file, 2) as reader:
        reader.read(np.array([3 * BLOCK_BYTES, 6 * BLOCK_BYTES - 1]))
        np.testing.assert_array_equal(reader._buffer.reshape(2, -1).T[[0, -1]], [[3, 5]] * 2)


def test_the_last_block_may_be_shorter(file: Path) -> None:
    with DirectReader(file, 1) as reader:
        assert len(reader.read(np.array([BLOCKS * BLOCK_BYTES])).latencies_s) == 1


def test_no_reads_take_no_time(file: Path) -> None:
    with DirectReader(file, 1) as reader:
        assert reader.read(np.empty(0, dtype=np.int64)).elapsed_s == 0


def test_a_place_beyond_the_file_is_named(file: Path) -> None:
    place = (BLOCKS + 1) * BLOCK_BYTES
    wanted = f"{file} can't be read at {place}: it ends before that"
    with DirectReader(file, 4) as reader, pytest.raises(OSError, match=re.escape(wanted)):
        reader.read(np.array([0, place]))


def test_a_file_that_takes_no_direct_reads_is_named() -> None:
    with pytest.raises(OSError, match=r"^\[Errno 22\] /proc/self/status can't be read directly: Invalid argument$"):
        DirectReader(Path("/proc/self/status"), 1)


def test_a_refused_system_call_is_said_to_be_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    monkeypatch.setitem(aio.NUMBERS, os.uname().machine, (100_000,) * 4)  # no such system call
    with pytest.raises(OSError, match="can't be read asynchronously: Function not implemented") as caught:
        DirectReader(file, 1)
    assert caught.value.errno == errno.ENOSYS
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_an_unknown_machine_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    wanted = "asynchronous reads are known on ['aarch64', 'x86_64'], this machine is riscv64"
    with pytest.raises(OSError, match=re.escape(wanted)):
        DirectReader(file, 1)


def test_closing_twice_closes_once(file: Path) -> None:
    reader = DirectReader(file, 1)
    reader.close()
    with file.open("rb") as other:  # gets the number the reader had
        reader.close()
        assert other.read(1) == b"\0"
