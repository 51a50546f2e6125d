"""Sizes and shares as people write them."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size_text(num_bytes: float) -> str:
    """Return bytes in the largest unit that leaves at least one, as in ``1.5 MiB``."""
    unit = 0
    while num_bytes >= 1024 and unit + 1 < len(UNITS):
        num_bytes, unit = num_bytes / 1024, unit + 1
    return f"{num_bytes:.{0 if num_bytes >= 100 or num_bytes == int(num_bytes) else 1}f} {UNITS[unit]}"


def share_text(share: float) -> str:
    """Return a share as percents, as in ``3.1 %``."""
    return f"{100 * share:.1f} %"
