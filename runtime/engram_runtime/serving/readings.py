"""What sites did at one position, in plain numbers."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from engram_runtime.activity import Activity, SiteActivity
from engram_runtime.parallel.sessions import row_ids_of
from engram_runtime.serving.events import SiteReading
from engram_runtime.session import Session


def readings(activity: Activity, row_ids: Mapping[str, NDArray[np.int64]], row: int) -> dict[str, SiteReading] | None:
    """Return what each site did at one of the positions of a pass; None where the bundle doesn't tell of any.

    Args:
        row_ids: ``[R, C]`` by site; what sites do without rows means nothing.
    """
    told = {name: _reading(each, row, row_ids[name][row]) for name, each in activity.items() if name in row_ids}
    return told or None


def _reading(activity: SiteActivity, row: int, row_ids: NDArray[np.int64]) -> SiteReading:
    (contribution,) = SiteActivity(activity.values[row][None]).contribution.tolist()
    return SiteReading(row_ids.tolist(), float(activity.gate[row].mean()), contribution)


def prompt_readings(session: Session) -> dict[str, SiteReading] | None:
    """Return what each site did at the last position of the prompt that a session has computed."""
    *history, last = session.token_ids
    activity = {name: SiteActivity(each.values[-1:]) for name, each in session.activity.items()}
    return readings(activity, row_ids_of(session, history, last), 0)
