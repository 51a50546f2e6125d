"""Tokenizer compression: raw ids whose text is the same after normalising share one id (arXiv 2601.07372).

The rule is that of ``engram_demo_v1.py``: NFKC, NFD, accents stripped, lower case, runs of white space to one space,
both ends stripped; a lone space survives, and tokens that are parts of a character keep their own spelling.
"""

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, normalizers

from engram_runtime.detokenise import native_errors
from engram_runtime.errors import CheckpointError

LONE_SPACE = "\ue000"  # stands for a token that is one space while the ends are stripped
REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are no whole character

NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.NFD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        normalizers.Replace(Regex(r"^ $"), LONE_SPACE),
        normalizers.Strip(),
        normalizers.Replace(LONE_SPACE, " "),
    ]
)


def compress_vocabulary(tokenizer_json: bytes, problem: str = "the tokenizer can't be used") -> NDArray[np.int32]:
    """Return ``[V]``: raw id -> compressed id, numbered in the order the keys are first seen.

    Args:
        problem: what an error begins with.

    Raises:
        CheckpointError: the tokenizer can't be used.
    """
    known: dict[str, int] = {}
    with native_errors(CheckpointError, problem):
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
        size = tokenizer.get_vocab_size(with_added_tokens=True)
        return np.array([known.setdefault(_key(tokenizer, raw), len(known)) for raw in range(size)], dtype=np.int32)


def _key(tokenizer: Tokenizer, raw_id: int) -> str:
    text = tokenizer.decode([raw_id], skip_special_tokens=False)
    if REPLACEMENT in text:
        return str(tokenizer.id_to_token(raw_id))
    return NORMALIZER.normalize_str(text) or text
