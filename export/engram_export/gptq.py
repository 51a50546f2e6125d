"""int4 by GPTQ: what rounding a column does to a layer's outputs is made up for by the columns not yet rounded.

Reference: Frantar et al., arXiv 2210.17323, in the form of Chee et al., arXiv 2307.13304 (section 3), which gives the
same without inverting a matrix. Columns keep their order, so blocks stay as they are stored; a block's multiplier and
zero are searched when its turn comes, among the weights as corrected by then.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from engram_export.quantise import BLOCK, MAX_CODE, Codes, Floats, Int4Weight, nonzero, row_scale, search_blocks

# Of the mean of the diagonal, added to it. The paper's 0.01 fits a text of 5,000 tokens too closely: on other texts
# 0.1, the only other one compared, was better. This lies between them.
DAMPING = 0.05


def quantise_gptq(weight: Floats, products: NDArray[np.float64]) -> Int4Weight:
    """Quantise ``weight [N, K]`` for inputs ``[T, K]`` whose products ``inputs.T @ inputs`` are given."""
    feedback = error_feedback(products)
    scale = row_scale(weight.reshape(len(weight), -1, BLOCK))
    columns = np.ascontiguousarray(weight.T)  # [K, N]
    codes, errors = np.empty(columns.shape, dtype=np.uint8), np.empty_like(columns)
    multipliers, zeros = [], []
    for start in range(0, len(columns), BLOCK):
        block = slice(start, start + BLOCK)
        corrected = columns[block] + feedback[:start, block].T @ errors[:start]
        multiplier, zero = search_blocks(np.ascontiguousarray(corrected.T)[:, None], scale)
        step, offset = multiplier[:, 0] * scale[:, 0], zero[:, 0].astype(np.float32)
        codes[block], errors[block] = _round_block(columns[block], corrected, feedback[block, block], step, offset)
        multipliers.append(multiplier)
        zeros.append(zero)
    multiplier, zero = np.concatenate(multipliers, axis=1), np.concatenate(zeros, axis=1)
    return Int4Weight(np.ascontiguousarray(codes.T), multiplier, zero, scale)


def error_feedback(products: NDArray[np.float64]) -> Floats:
    """Return ``[K, K]``, of which entry (j, k), j < k, is the share of column j's error that column k takes over."""
    damping = DAMPING * products.diagonal().mean() or 1.0  # where all inputs were zero any will do
    damped = torch.from_numpy(products + damping * np.eye(len(products)))
    # Upper triangular R with R R^T: the Cholesky decomposition of the matrix read backwards.
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    feedback: Floats = (upper / upper.diagonal()).to(torch.float32).numpy()
    return feedback


def _round_block(
    columns: Floats, corrected: Floats, feedback: Floats, step: Floats, zero: Floats
) -> tuple[Codes, Floats]:
    """Round the columns ``[32, N]`` of a block one after another; return their codes and errors."""
    codes, errors = np.empty(columns.shape, dtype=np.uint8), np.empty_like(columns)
    for k in range(len(columns)):
        wanted = corrected[k] + feedback[:k, k] @ errors[:k]
        code = np.clip(np.rint(wanted / nonzero(step)) + zero, 0, MAX_CODE)
        codes[k] = code.astype(np.uint8)
        errors[k] = columns[k] - (code - zero) * step
    return codes, errors
