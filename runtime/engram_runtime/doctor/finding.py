"""What a check finds."""

from dataclasses import dataclass
from typing import Literal, Self

from engram_runtime.errors import EngramError

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do where it isn't well; a failure keeps bundles from running."""

    name: str
    state: State
    detail: str
    mend: str | None = None

    @classmethod
    def of_error(cls, name: str, error: EngramError) -> Self:
        """Return the failure an error tells of, whose last clause says what to do."""
        detail, _, mend = str(error).rpartition("; ")
        return cls(name, "fail", detail, mend) if detail else cls(name, "fail", mend)
