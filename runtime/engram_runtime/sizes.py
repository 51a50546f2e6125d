"""Sizes and times as people write them."""

import re

from engram_runtime.errors import RequestError

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,18}))? ?(B|[KMGT]iB)?")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``512MiB``, ``1.5 GiB`` or ``0``, rounded down.

    Raises:
        RequestError: anything else, ``GB`` included, which some take for 10^9 bytes and others for 2^30.
    """
    found = SIZE.fullmatch(text)
    if found is None:
        raise RequestError(f"{text!r} is not a size, expected one such as 512MiB, 1.5GiB or 0")
    whole, decimals, size = found[1], found[2] or "0", UNITS[found[3] or "B"]
    return int(whole) * size + int(f"{decimals:0<18}") * size // 10**18


def format_size(num_bytes: int) -> str:
    """Return bytes in the largest unit they fill, with one decimal."""
    unit = max((name for name, size in UNITS.items() if size <= num_bytes), key=UNITS.__getitem__, default="B")
    return f"{num_bytes} B" if unit == "B" else f"{num_bytes / UNITS[unit]:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """Return a time in s, ms or us, the largest of which it fills one."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
