"""A2: damaged GGUF files."""

import math
import random
import struct
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tests.faults.parsers_mutators import NUMBERS, TEXTS, blind
from tests.faults.parsers_survey import Parser, evenly, survey
from tests.faults.row import Outcome, Row
from tokenizers import Tokenizer

from engram_export.checkpoint import open_checkpoint
from engram_export.gguf_file import GgufTensors
from engram_export.gguf_header import SCALAR_FORMATS
from engram_export.outlines.checkpoint import outline_checkpoint
from engram_runtime.errors import CheckpointError

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
HIDDEN, FEED_FORWARD, TOKENS, LAYERS = 64, 96, 24, 1
FLOAT32, Q4_0, Q8_0 = 0, 2, 8
BYTES_OF = {FLOAT32: 4.0, Q4_0: 18 / 32, Q8_0: 34 / 32}


@dataclass(slots=True)
class Document:
    """A GGUF file before it is bytes; counts that are None are the true ones.

    Attributes:
        entries: metadata as ``[key, kind, value]``, of an array ``[key, 9, [kind, count, values]]``.
        infos: tensors as ``[name, dims, type, offset]``.
    """

    entries: list[list[Any]]
    infos: list[list[Any]]
    data: bytes
    version: int = 3
    counts: list[int | None] = field(default_factory=lambda: [None, None])

    def to_bytes(self) -> bytes:
        found = (len(self.infos), len(self.entries))
        counts = [true if told is None else told for told, true in zip(self.counts, found, strict=True)]
        head = b"GGUF" + _number("I", self.version) + _number("Q", counts[0]) + _number("Q", counts[1])
        head += b"".join(_string(key) + _number("I", kind) + _value(kind, value) for key, kind, value in self.entries)
        for name, dims, kind, offset in self.infos:
            head += _string(name) + _number("I", len(dims)) + b"".join(_number("Q", dim) for dim in dims)
            head += _number("I", kind) + _number("Q", offset)
        return head + bytes(-len(head) % 32) + self.data


def _number(layout: str, value: float) -> bytes:
    """Return a number as the format has it, cut to its size."""
    size = struct.calcsize(layout)
    if layout in "fd":
        try:
            return struct.pack("<" + layout, float(value))
        except OverflowError:
            return struct.pack("<" + layout, float("inf"))
    whole: int = -1 if isinstance(value, float) and not math.isfinite(value) else int(value)
    return (whole % (1 << 8 * size)).to_bytes(size, "little")


def _string(text: str | bytes) -> bytes:
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return _number("Q", len(data)) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == ARRAY and isinstance(value, list):
        inner, count, values = value
        told = len(values) if count is None else count
        return _number("I", inner) + _number("Q", told) + b"".join(_value(inner, each) for each in values)
    if isinstance(value, str | bytes):
        return _string(value)
    if isinstance(value, list):
        return b""
    return _number(SCALAR_FORMATS.get(kind, "Q"), value)


def sound_document(arch: str, kind: str) -> Document:
    """Return a model of one layer with a vocabulary of ``kind``, ``gpt2`` or ``llama``."""
    sizes = {"block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": 96}
    entries: list[list[Any]] = [["general.architecture", STRING, arch], ["general.alignment", U32, 32]]
    entries += [[f"{arch}.{name}", U32, value] for name, value in sizes.items()]
    entries += [[f"{arch}.attention.head_count", U32, 4], [f"{arch}.attention.head_count_kv", U32, 2]]
    entries += [[f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5], [f"{arch}.rope.freq_base", F32, 10000.0]]
    entries += [[f"{arch}.rope.scaling.type", STRING, "linear"], [f"{arch}.rope.scaling.factor", F32, 2.0]]
    entries += _vocabulary(kind)
    infos: list[list[Any]] = []
    size = 0
    for name, dims, stored in _tensors(arch):
        infos.append([name, dims, stored, size])
        size += int(np.prod(dims) * BYTES_OF[stored]) + 31 & ~31
    return Document(entries, infos, bytes(size))


def _vocabulary(kind: str) -> list[list[Any]]:
    letters = ["a", "b", "c", "d", "ab", "cd", "abcd"] if kind == "gpt2" else ["\u2581", "a", "b", "ab", "\u2581a", "c"]
    tokens = ["<unk>", "<s>", "</s>", *letters]
    tokens += [f"<{index}>" for index in range(len(tokens), TOKENS)]
    types = [2, 3, 3, *([1] * (TOKENS - 4)), 4]
    return [
        ["tokenizer.ggml.model", STRING, kind],
        ["tokenizer.ggml.pre", STRING, "default"],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, None, tokens]],
        ["tokenizer.ggml.token_type", ARRAY, [5, None, types]],
        ["tokenizer.ggml.scores", ARRAY, [F32, None, [-float(index) for index in range(TOKENS)]]],
        ["tokenizer.ggml.merges", ARRAY, [STRING, None, ["a b", "c d", "ab cd"] if kind == "gpt2" else []]],
        ["tokenizer.ggml.bos_token_id", U32, 1],
        ["tokenizer.ggml.eos_token_id", U32, 2],
        ["tokenizer.ggml.add_bos_token", BOOL, True],
        ["tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"],
    ]


def _tensors(arch: str) -> list[tuple[str, list[int], int]]:
    layer = {"q": HIDDEN, "k": HIDDEN // 2, "v": HIDDEN // 2, "output": HIDDEN}
    found = [("token_embd.weight", [HIDDEN, TOKENS], Q8_0), ("output_norm.weight", [HIDDEN], FLOAT32)]
    found += [(f"blk.0.attn_{name}.weight", [HIDDEN, rows], Q4_0) for name, rows in layer.items()]
    found += [(f"blk.0.ffn_{name}.weight", [HIDDEN, FEED_FORWARD], FLOAT32) for name in ("gate", "up")]
    found += [("blk.0.ffn_down.weight", [FEED_FORWARD, HIDDEN], Q8_0)]
    found += [(f"blk.0.{name}_norm.weight", [HIDDEN], FLOAT32) for name in ("attn", "ffn")]
    norms = [(f"blk.0.attn_{name}_norm.weight", [HIDDEN // 4], FLOAT32) for name in ("q", "k")]
    return found + (norms if arch == "qwen3" else [])


def damaged(rng: random.Random, documents: Sequence[Document]) -> bytes:
    """Return a file with one to three facts changed, and in one of four with its bytes damaged too."""
    document = deepcopy(rng.choice(documents))
    if rng.random() < 0.15:
        return blind(rng, document.to_bytes())
    for _ in range(rng.choice((1, 1, 2, 3))):
        if document.entries and document.infos:
            rng.choice(CHANGES)(rng, document)
    data = document.to_bytes()
    return blind(rng, data) if rng.random() < 0.1 else data


def _header(rng: random.Random, document: Document) -> None:
    document.version = rng.choice((0, 1, 2, 4, 2**24 * 3))
    document.counts[rng.randrange(2)] = rng.choice(NUMBERS)


def _entry(rng: random.Random, document: Document) -> None:
    entry = rng.choice(document.entries)
    if entry[1] == ARRAY and isinstance(entry[2], list) and rng.random() < 0.8:
        _array(rng, entry[2])
    else:
        entry[rng.randrange(3)] = rng.choice((*NUMBERS, float("nan"), float("inf"), *TEXTS, b"\xff\xfe\xc3"))
        entry[0], entry[1] = str(entry[0]), entry[1] if type(entry[1]) is int else STRING


def _array(rng: random.Random, array: list[Any]) -> None:
    inner, _, values = array
    match rng.randrange(6):
        case 0:
            array[1] = rng.choice(NUMBERS)
        case 1:
            array[0] = rng.choice((*SCALAR_FORMATS, STRING, ARRAY, 13, 2**31))
        case 2:
            array[2] = values * rng.choice((0, 2, 200))
        case 3 if values:
            values[rng.randrange(len(values))] = rng.choice(TEXTS if inner == STRING else NUMBERS)
        case 4 if values:
            values[rng.randrange(len(values))] = rng.choice(values)
        case _:
            rng.shuffle(values)


def _moved_entry(rng: random.Random, document: Document) -> None:
    entry = rng.choice(document.entries)
    if rng.random() < 0.5:
        document.entries.remove(entry)
    else:
        document.entries.insert(rng.randint(0, len(document.entries)), deepcopy(entry))


def _tensor(rng: random.Random, document: Document) -> None:
    info, other = rng.choice(document.infos), rng.choice(document.infos)
    match rng.randrange(8):
        case 0:
            info[1] = [rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 2, 3, 4, 5, 300)))]
        case 1:
            info[1][rng.randrange(len(info[1]))] = rng.choice(NUMBERS)
        case 2:
            info[2] = rng.choice((*range(40), 2**32 - 1))
        case 3:
            info[3] = rng.choice((*NUMBERS, other[3], info[3] + 1, info[3] + 32))
        case 4:
            info[0] = rng.choice((other[0], *TEXTS, "blk.0.attn_q.bias", "blk.7.attn_q.weight", "rope_freqs.weight"))
        case 5:
            info[1] = info[1][::-1] + [1] * rng.randint(0, 1)
        case 6:
            document.infos.remove(info)
        case _:
            position = rng.randrange(1, 4)
            info[position], other[position] = other[position], info[position]
    info[1] = info[1] or [1]


def _data(rng: random.Random, document: Document) -> None:
    document.data = rng.randbytes(len(document.data))[: rng.choice((None, 0, 1, -1, 4096))]


CHANGES: Sequence[Callable[[random.Random, Document], None]] = (
    *(_header, _entry, _entry, _entry, _moved_entry, _tensor, _tensor, _tensor, _data),
)


def use_gguf(path: Path) -> None:
    """Open a file, read the first and last rows of its tensors, encode a text, and plan its export."""
    checkpoint = open_checkpoint(path)
    tensors = checkpoint.tensors
    assert isinstance(tensors, GgufTensors)
    for name in tensors.names():
        rows = tensors.shape(name)[0]
        with np.errstate(all="ignore"):  # what stands in a file of random bytes
            tensors.read_rows(name, 0, 1)
            tensors.read_rows(name, rows - 1, rows)
    if checkpoint.tokenizer_json is not None:
        Tokenizer.from_buffer(checkpoint.tokenizer_json).encode("abcd ab")
    outline_checkpoint(path, quant=None, table_dtype=None, context=None)


def _parser(arch: str, kind: str) -> Parser:
    document = sound_document(arch, kind)
    return Parser(
        name=f"gguf {arch} {kind}",
        damaged=lambda rng: damaged(rng, [document]),
        use=use_gguf,
        refusals=(CheckpointError,),
        sound=document.to_bytes(),
        file="model.gguf",
    )


PARSERS = (_parser("llama", "gpt2"), _parser("qwen3", "llama"))


def ggufs(count: int) -> Outcome:
    """Damage GGUF files."""
    return survey(*evenly(count, PARSERS))


ROWS = (
    Row(
        name="A2",
        fault="a GGUF file damaged in counts, dimensions, offsets, types, alignment, keys or bytes",
        expected="CheckpointError, or rows, a tokenizer and an outline; at most 1 s and 64 MiB",
        quick=10_000,
        full=400_000,
        run=ggufs,
    ),
)
