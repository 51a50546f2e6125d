"""What all kinds of targets have in common."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from engram_runtime.errors import TargetError
from engram_runtime.strict_json import Fields

HARDWARE, EMULATED, SIMULATED, COMPILED = EVIDENCE = ("hardware", "emulated", "simulated", "compiled")
CACHE_DTYPES = ("float32", "float16")
MOST_SEQUENCES = 8  # of one pass: attention's kernel holds its code once for each
MOST_TOKENS = 4096  # of one pass: its code grows with none of them, its activations and the time to compile do
MOST_COUNTS = 16
MOST_TEXT = 200
WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """A kind of machine that bundles are compiled for.

    Attributes:
        name: of the profile's file, and of the folder its libraries lie in.
        description: which boxes it is for.
        evidence: what this project has run whole models on: ``hardware``, ``emulated``, ``simulated``, or, where they
            were ``compiled`` only, nothing.
        kernels: kernel family, a module of `engram_compilers.kernels`; of an npu the accelerator.
        decode_tokens: token counts compiled with logits for every token, from 1; up to 8 they are numbers of sequences
            as well.
        prefill_tokens: larger token counts, which a prompt is split into, compiled with logits for every token and for
            the last one only.
        cache_dtype: what attention's keys and values are kept in, ``float32`` or ``float16``.
    """

    device: ClassVar[str]
    families: ClassVar[tuple[str, ...]]

    name: str
    description: str
    evidence: str
    kernels: str
    decode_tokens: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    cache_dtype: str

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """(tokens, rows of logits) of every forward pass that is compiled."""
        every_row = [(count, count) for count in (*self.decode_tokens, *self.prefill_tokens)]
        last_row = [(count, 1) for count in (*self.decode_tokens, *self.prefill_tokens) if count > 1]
        return (*every_row, *last_row)

    @property
    def batches(self) -> tuple[int, ...]:
        """Numbers of sequences, a token of each, whose forward passes are compiled."""
        return tuple(count for count in self.decode_tokens if 1 < count <= MOST_SEQUENCES)


def common_values(name: str, fields: Fields, families: tuple[str, ...]) -> dict[str, Any]:
    """Take the keys that every profile has, as the arguments of a `Profile`.

    Raises:
        BundleError: a key is missing or of another type.
        TargetError: a value is none of those there are.
    """
    counts = tuple(fields.integers(key) for key in ("decode_tokens", "prefill_tokens"))
    check_counts(name, [*counts[0], *counts[1]])
    return {
        "name": name,
        "description": text(name, fields, "description"),
        "evidence": choice(name, fields, "evidence", EVIDENCE),
        "kernels": choice(name, fields, "kernels", families),
        "decode_tokens": counts[0],
        "prefill_tokens": counts[1],
        "cache_dtype": choice(name, fields, "cache_dtype", CACHE_DTYPES),
    }


def check_counts(name: str, counts: list[int]) -> None:
    """Refuse token counts that don't ascend from 1; raises TargetError."""
    if counts[:1] != [1] or counts != sorted(set(counts)):
        raise TargetError(f"profile {name} compiles token counts {counts}, expected ascending ones from 1")
    if len(counts) > MOST_COUNTS or counts[-1] > MOST_TOKENS:
        raise TargetError(
            f"profile {name} compiles {len(counts)} token counts to {counts[-1]}, "
            f"expected at most {MOST_COUNTS} to {MOST_TOKENS}"
        )


def choice(name: str, fields: Fields, key: str, choices: tuple[str, ...]) -> str:
    """Take one of the values there are; raises TargetError for another."""
    value = fields.take(key, str)
    if value not in choices:
        raise TargetError(f"profile {name} has {key} {value[:MOST_TEXT]!r}, there are {list(choices)}")
    return value


def text(name: str, fields: Fields, key: str) -> str:
    """Take a line of text; raises TargetError for an empty, a long one or one that doesn't print."""
    value = fields.take(key, str)
    if not value.isprintable() or not 1 <= len(value) <= MOST_TEXT:
        raise TargetError(
            f"profile {name} has {key} {value[:MOST_TEXT]!r}, expected a line of 1 to {MOST_TEXT} characters"
        )
    return value


def words(name: str, key: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return names of processors and features, which go to compilers and linkers; raises TargetError for others."""
    for value in values:
        if not WORD.fullmatch(value):
            raise TargetError(
                f"profile {name} has {key} {value[:MOST_TEXT]!r}, expected 1 to 64 letters, digits and any of . _ + -"
            )
    return values


def number(name: str, fields: Fields, key: str, least: int, most: int) -> int:
    """Take an integer in a range; raises TargetError for one outside."""
    value = fields.take(key, int)
    if not least <= value <= most:
        raise TargetError(f"profile {name} has {key} {value}, expected {least} to {most}")
    return value
