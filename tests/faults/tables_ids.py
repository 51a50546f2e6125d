"""C5: row ids of extreme tokens and constants against integers without bounds, and ids that no table has."""

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from tests.faults.row import Outcome, Row
from tests.faults.tables_bundle import IOS, RECORD, write_bundle

from engram_runtime.hashing import column_offsets
from engram_runtime.keyer_spec import NgramKeyerSpec
from engram_runtime.keyers import NO_ROW, NO_TOKEN
from engram_runtime.table_spec import TableSpec
from engram_runtime.tables.decoding import NumpyRowDecoder
from engram_runtime.tables.mapped import MappedTable
from engram_runtime.tables.opening import open_table
from engram_runtime.tables.pread import PreadTable
from engram_runtime.tables.store import TableStore

INT64_MAX = 2**63 - 1
MOST_TOKENS = 48  # of a block: some are hashed by numpy, those of up to 8 in plain Python
UNMAPPED_VOCAB = 1 << 22


def hashed(count: int) -> Outcome:
    """Hash random and extreme ids by random and extreme constants until so many row ids were compared."""
    rng, compared, failures = random.Random("C5"), 0, []
    while compared < count:
        spec, vocab_size, token_map = random_keyer(rng)
        tokens = [token_of(rng, spec, vocab_size) for _ in range(rng.randrange(2, 2 * MOST_TOKENS))]
        split = rng.randrange(max(0, len(tokens) - MOST_TOKENS), len(tokens))
        mapped = None if token_map is None else np.array(token_map, dtype=np.int64)
        found = spec.keyer(vocab_size, mapped).row_ids(tokens[:split], np.array(tokens[split:], dtype=np.int64))
        expected = [true_row_ids(spec, token_map, tokens, place) for place in range(split, len(tokens))]
        compared += found.size
        if found.tolist() != expected:
            failures.append(f"{spec}, vocabulary of {vocab_size}, tokens {tokens}, {split} of them history")
    return Outcome(tried=compared, survived=0 if failures else compared, failures=tuple(failures[:3]))


def random_keyer(rng: random.Random) -> tuple[NgramKeyerSpec, int, Sequence[int] | None]:
    """Return constants, some at the edge of 64 bits, a vocabulary and a token map or None."""
    orders = sorted(rng.sample(range(1, 17), rng.randint(1, 3)))
    heads = rng.randint(1, 12)
    is_mapped = rng.random() < 0.5
    vocab_size = rng.choice([1, 2, rng.randrange(3, 500)]) if is_mapped else rng.choice([1, 2, 50_000, UNMAPPED_VOCAB])
    largest = rng.choice([1, vocab_size, 2**31 - 1]) if is_mapped else vocab_size - 1
    token_map = [rng.choice([0, largest, rng.randint(0, largest)]) for _ in range(vocab_size)] if is_mapped else None
    pad_id = rng.choice([0, largest, rng.randint(0, largest)])
    most = INT64_MAX // max(largest, pad_id, 1)
    multipliers = [rng.choice([1, most, rng.randint(1, most)]) for _ in range(orders[-1])]
    primes = [rng.choice([2, 3, rng.randrange(2, 2**40)]) for _ in range(heads * len(orders))]
    named = [sorted(rng.sample(range(vocab_size), min(vocab_size, rng.randrange(3)))) for _ in range(2)]
    spec = NgramKeyerSpec(
        orders=tuple(orders),
        num_heads=heads,
        multipliers=tuple(multipliers),
        primes=tuple(primes),
        offsets=tuple(column_offsets(np.array(primes)).tolist()),
        pad_id=pad_id,
        barrier_ids=tuple(named[0]),
        silent_ids=tuple(named[1]),
    )
    spec.check()
    return spec, vocab_size, token_map


def token_of(rng: random.Random, spec: NgramKeyerSpec, vocab_size: int) -> int:
    """Return a token, often the first or last one, a barrier, a silent one or none."""
    return rng.choice([0, vocab_size - 1, NO_TOKEN, *spec.barrier_ids, *spec.silent_ids, *random_ids(rng, vocab_size)])


def random_ids(rng: random.Random, vocab_size: int) -> list[int]:
    """Return a few tokens."""
    return [rng.randrange(vocab_size) for _ in range(6)]


def true_row_ids(spec: NgramKeyerSpec, token_map: Sequence[int] | None, tokens: Sequence[int], place: int) -> list[int]:
    """Return the row ids of a token by Python's integers."""
    token = tokens[place]
    if token == NO_TOKEN or token in spec.silent_ids:
        return [NO_ROW] * len(spec.primes)
    seen = []
    for back in range(spec.orders[-1]):
        earlier = tokens[place - back] if back <= place else NO_TOKEN
        if back and (earlier == NO_TOKEN or earlier in spec.barrier_ids):
            seen += [spec.pad_id] * (spec.orders[-1] - back)
            break
        seen.append(earlier if token_map is None else token_map[earlier])
    row_ids = []
    for index, (prime, offset) in enumerate(zip(spec.primes, spec.offsets, strict=True)):
        mixed = 0
        for each, multiplier in zip(seen[: spec.orders[index // spec.num_heads]], spec.multipliers, strict=False):
            mixed ^= each * multiplier
        row_ids.append(mixed % prime + offset)
    return row_ids


def refused(count: int) -> Outcome:
    """Ask for rows that no table has, among others that it has."""
    rng, failures = random.Random("C5 ids"), []
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", 64_000)
        (spec,) = bundle.manifest.tables
        tables: dict[str, TableStore] = {io: open_table(bundle, spec, io) for io in IOS}
        decoder = NumpyRowDecoder(spec.record, [spec.record.record_bytes])
        tables["pread without reads"] = PreadTable.open(spec, bundle.table_path, decoder, read=no_read)
        tables["mmap without reads"] = MappedTable(spec, bundle.table_path, decoder, read=no_read)
        for number in range(count):
            name = list(tables)[number % len(tables)]
            row_ids = ids_with_a_wrong_one(rng, spec)
            if wrong := taken(tables[name], row_ids):
                failures.append(f"{name}: {wrong} {row_ids.tolist()}")
    return Outcome(tried=count, survived=count - len(failures), failures=tuple(failures[:8]))


def no_read(*arguments: object) -> NoReturn:
    """Be a read that must not happen."""
    raise AssertionError(f"a file was read: {arguments}")


def ids_with_a_wrong_one(rng: random.Random, spec: TableSpec) -> NDArray[np.int64]:
    """Return row ids one or more of which are outside the table: few or many, as they are checked differently."""
    rows = spec.num_rows
    outside = [
        -1,
        -rows,
        -rows - 1,
        rows,
        rows + 1,
        2**31,
        2**32,
        INT64_MAX,
        -(2**63),
        INT64_MAX // RECORD.record_bytes,
    ]
    wrong = [
        rng.choice([*outside, rng.randint(rows, INT64_MAX), -rng.randint(1, 2**63)]) for _ in range(rng.randint(1, 3))
    ]
    row_ids = [rng.randrange(rows) for _ in range(rng.choice([0, 3, 15, 400]))] + wrong
    rng.shuffle(row_ids)
    return np.array(row_ids, dtype=np.int64)


def taken(table: TableStore, row_ids: NDArray[np.int64]) -> str:
    """Return what a table took that it should have refused."""
    out = np.full((len(row_ids), RECORD.columns), np.float32(7))
    asks: Mapping[str, Callable[[], None]] = {
        "gathered": lambda: table.gather(row_ids, out),
        "requested": lambda: table.request(row_ids),
    }
    for what, ask in asks.items():
        try:
            ask()
        except IndexError:
            continue
        return what
    return "" if (out == 7).all() else "changed the caller's buffer for"


ROWS = (
    Row(
        name="C5",
        fault="tokens at the ends of the vocabulary, barriers, no tokens; multipliers and ids up to 64 bits together",
        expected="row ids equal those of Python's unbounded integers",
        quick=1_000_000,
        full=50_000_000,
        run=hashed,
    ),
    Row(
        name="C5 ids",
        fault="row ids below 0, beyond the table and at the ends of 64 bits among others",
        expected="IndexError before anything is read or written",
        quick=20_000,
        full=1_000_000,
        run=refused,
    ),
)
