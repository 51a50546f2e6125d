"""Sequences of token ids."""

from collections.abc import Sequence

from engram_runtime.errors import RequestError


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def require_vocabulary(token_ids: Sequence[int], vocab_size: int) -> None:
    """Check that a model knows all of these ids; raises RequestError."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {vocab_size}")


def require_room(count: int, held: int, context_length: int) -> None:
    """Check that a context takes ``count`` more tokens after those it holds, at least one; raises RequestError."""
    if count == 0:
        raise RequestError("no tokens were given; the model needs at least one")
    if (total := held + count) > context_length:
        raise RequestError(f"{total} tokens exceed the context of {context_length}; shorten the prompt")
