"""Shares as people write them."""


def format_share(share: float) -> str:
    """Return a share as percents, as in ``3.1 %``."""
    return f"{100 * share:.1f} %"
