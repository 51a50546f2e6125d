"""Passes that aren't full are as if they were of the tokens that are meant alone."""

import numpy as np
import pytest

from engram_runtime.executor import PendingRows, StepInputs
from engram_runtime.executors.padding import padded_inputs

SIZE = 4


@pytest.mark.parametrize("every", [True, False])
def test_tokens_rows_and_states_come_first_and_nothing_is_read_beside_them(every: bool) -> None:
    rows = np.arange(3 * 2 * 5, dtype=np.float32).reshape(3, 2, 5)
    hidden = np.arange(3 * 7, dtype=np.float32).reshape(3, 7)
    inputs = StepInputs(
        token_ids=np.array([5, 6, 7]),
        position=9,
        logit_rows=np.arange(3) if every else np.array([2]),
        rows={"site": PendingRows(rows.shape, lambda out: np.copyto(out, rows))},
        hidden=hidden,
    )
    padded = padded_inputs(inputs, SIZE)
    assert padded.token_ids.tolist() == [5, 6, 7, 7]
    assert padded.logit_rows.tolist() == ([0, 1, 2, 3] if every else [2])
    assert padded.position == 9
    assert padded.hidden is not None
    assert np.array_equal(padded.hidden, hidden[[0, 1, 2, 2]])
    assert padded.embeddings is None
    filled = np.full(padded.rows["site"].shape, np.nan, dtype=np.float32)
    padded.rows["site"].fill(filled)
    assert np.array_equal(filled[:3], rows)
    assert not filled[3:].any()
