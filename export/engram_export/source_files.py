"""Bounded, exact reads of the files a checkpoint is made of; links are followed, as model caches consist of them."""

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import CheckpointError


def file_size(path: Path) -> int:
    """Return the bytes a regular file holds; pipes, devices and folders are refused."""
    try:
        info = path.stat()
    except OSError as err:
        raise _unreadable(path, err) from err
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path} is not a regular file; give the path of a file")
    return info.st_size


def read_exactly(path: Path, offset: int, num_bytes: int) -> NDArray[np.uint8]:
    """Read ``[num_bytes]`` bytes at ``offset`` into a fresh array."""
    data = np.empty(num_bytes, dtype=np.uint8)
    view, filled = data.data, 0
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while filled < num_bytes and (count := stream.readinto(view[filled:])):
                filled += count
    except OSError as err:
        raise _unreadable(path, err) from err
    if filled < num_bytes:
        raise CheckpointError(
            f"{path} ends at byte {offset + filled}, wanted {num_bytes} bytes from byte {offset}; "
            f"the file changed while it was read, copy or download it again"
        )
    return data


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """Read a whole file of at most ``max_bytes``."""
    size = file_size(path)
    if size > max_bytes:
        raise CheckpointError(
            f"{path} holds {size} bytes, at most {max_bytes} are read; check that it is the right file"
        )
    return read_exactly(path, 0, size).tobytes()


def check_row_range(name: str, shape: tuple[int, ...], start: int, stop: int) -> None:
    """Refuse rows that are not within the first axis; a negative index would silently mean another row."""
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise IndexError(f"rows {start}:{stop} of tensor {name!r} are outside its shape {list(shape)}")


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; repeated keys, NaN and anything but UTF-8 are refused, ``where`` opens the message."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{where} is not valid json: {_reason(err)}; copy or download the file again") from err
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a json {type(value).__name__}, wanted an object; check the file")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in pairs:
        if key in items:
            raise ValueError(f"key {key!r} appears twice")
        items[key] = value
    return items


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"the value {name} is not a number in json")


def _reason(err: ValueError | RecursionError) -> str:
    if isinstance(err, RecursionError):
        return "it is nested too deeply"
    text = str(err).splitlines()[0]
    return text[:1].lower() + text[1:]


def _unreadable(path: Path, err: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {err.strerror}; check the path and its permissions")
