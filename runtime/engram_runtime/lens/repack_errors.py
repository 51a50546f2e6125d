"""What rows would lose by being quantised anew: the export package does it, where it is installed."""

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_runtime.errors import EngramError

REPACKING = "engram_export.repack"  # needs the export extra
DTYPES = ("int8", "fp8", "int4")
NOT_INSTALLED = "not measured: quantising needs {}: pip install 'engram-edge[export]'"
LARGEST = float(np.finfo(np.float16).max)  # of values that repacked rows can hold


class RepackErrors:
    """Relative errors of rows that are quantised and decoded again, summed up block by block."""

    def __init__(self, columns: int) -> None:
        """Prepare for rows of so many columns; what can't be measured is said in `results`."""
        self._results: dict[str, Any] = {}
        self._formats: dict[str, Any] = {}
        try:
            self._repack = importlib.import_module(REPACKING)
        except ModuleNotFoundError as error:
            self._results = dict.fromkeys(DTYPES, NOT_INSTALLED.format(error.name))
            return
        for dtype in DTYPES:
            try:
                self._formats[dtype] = self._repack.repacked_format(columns, dtype)
            except EngramError as error:
                self._results[dtype] = f"not measured: {error}"

    def add(self, values: NDArray[np.float32]) -> None:
        """Quantise ``[N, columns]`` rows; those with values beyond float16, or NaN, are left out."""
        fitting = values[(np.abs(values) <= LARGEST).all(axis=1)]
        if not len(fitting):
            return
        for dtype, record in self._formats.items():
            decoded = record.decode(self._repack.encode_rows(fitting, record))
            errors = self._repack.RowErrors.of(fitting, decoded)
            self._results[dtype] = self._results[dtype] + errors if dtype in self._results else errors

    def results(self) -> dict[str, dict[str, float] | str]:
        """Return by dtype the mean and the largest relative error and the number of rows, or why there is none."""
        return {dtype: _facts(self._results.get(dtype, "not measured: no row to quantise")) for dtype in DTYPES}


def _facts(result: Any) -> dict[str, float] | str:
    if isinstance(result, str):
        return result
    return {"mean": result.mean, "max": result.max, "rows": result.num_rows}
