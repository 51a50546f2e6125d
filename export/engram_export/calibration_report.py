"""What a calibration found, as it stands in ``golden/calibration.json``; divergences are in nats."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPORT_FILE = "golden/calibration.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleReport:
    """A role of linear layers: what it became, and the divergence in nats of int4 with this role otherwise.

    Attributes:
        int8_bytes: what the weights grow by where the role is int8.
        int8: the divergence with the role's weights in int8. ``one_plane``: with its inputs in one plane.
    """

    role: str
    format: str
    planes: int
    int8_bytes: int
    int8: float
    one_plane: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """A linear layer, and the relative errors int4 has: of its weights, and of its outputs on the calibration text."""

    name: str
    format: str
    planes: int
    weight_error: float
    output_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationReport:
    """How int4 layers were quantised.

    Attributes:
        method: gptq, or rounding for a ``reason``.
        held_out_tokens: those whose next token's distributions were compared.
        int4: the divergence of int4 everywhere, embedding and head in float. ``chosen``: of what was written,
            all weights and the inputs in one plane. Both on the ``held_out_tokens``, in nats.
    """

    method: str
    reason: str | None = None
    text: str | None = None
    tokens: int = 0
    held_out_tokens: int = 0
    int4: float | None = None
    chosen: float | None = None
    roles: Sequence[RoleReport] = ()
    linears: Sequence[LinearReport] = ()

    def write(self, bundle: Path) -> None:
        """Write the report into a bundle's folder."""
        (bundle / REPORT_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")
