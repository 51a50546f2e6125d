"""The C runtime against the Python one: rows, row ids, texts and errors, with a model that only shows its rows."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.c_programs import RUNTIME, SANITIZED, SOURCES, CError, CLibrary, CText, build, run
from tests.c_stub import CONTEXT, END_IDS, TOLD, write_stub
from tests.small_tables import sharded_spec

from engram_runtime.cpu import machine
from engram_runtime.hashing import column_offsets
from engram_runtime.keyer_spec import KeyerSpec, NgramKeyerSpec, TokenKeyerSpec
from engram_runtime.keyers import Keyer
from engram_runtime.records import PAYLOAD_BITS, SCALE_BYTES, RecordFormat
from engram_runtime.site import Site
from engram_runtime.table_spec import RowRange, TablePart, TableSpec
from engram_runtime.tables.decoding import NumpyRowDecoder
from engram_runtime.tables.pread import PreadTable

EMBEDDED = (Path(__file__).parents[1] / "docs" / "embedded.md").read_text(encoding="utf-8")
TOKENS = 256
RARE_IDS = (196, 205)  # of the speaker, as its end ids
FACTOR = "0x1.99999a0000000p-4"
WAYS = {"mapped": ("-DENGRAM_MAP_TABLES=1",), "pread": (), "without mmap": ("-DENGRAM_NO_MMAP",)}


def formats() -> list[RecordFormat]:
    """Return every payload with every scale, and one with a factor."""
    plain = [
        RecordFormat(payload=payload, columns=8, scale=scale, scale_columns=8 if scale == "none" else 4)
        for payload, scale in itertools.product(PAYLOAD_BITS, SCALE_BYTES)
    ]
    whole = [RecordFormat(payload=name, columns=256, scale="none", scale_columns=256) for name in ("float16", "int4")]
    return [*plain, *whole, dataclasses.replace(plain[-1], factor=FACTOR), dataclasses.replace(plain[0], factor=FACTOR)]


def keyers(folder: Path) -> list[KeyerSpec]:
    """Return keyers with everything a manifest may say of them."""
    rng = np.random.default_rng(5)
    (folder / "map.int32").write_bytes(rng.integers(0, 90, size=TOKENS, dtype=np.int32).tobytes())
    plain = ngram_keyer((2, 3), 2, pad_id=0)
    return [
        plain,
        dataclasses.replace(plain, token_map="map.int32", pad_id=89),
        ngram_keyer((1, 2, 5), 3, pad_id=7, barrier_ids=(0, 9, 200), silent_ids=(5,), token_map="map.int32"),
        ngram_keyer((16,), 1, pad_id=255, barrier_ids=(255,), silent_ids=(0, 1, 2, 255)),
        TokenKeyerSpec(vocab_size=100, pad_id=99),
    ]


def ngram_keyer(orders: tuple[int, ...], heads: int, **more: object) -> NgramKeyerSpec:
    rng = np.random.default_rng(len(orders))
    primes = [11, 13, 17, 19, 23, 29, 31, 37, 41][: len(orders) * heads]
    return NgramKeyerSpec(
        orders=orders,
        num_heads=heads,
        multipliers=tuple(int(value) for value in rng.integers(1 << 40, (1 << 63) // TOKENS - 1, size=max(orders))),
        primes=tuple(primes),
        offsets=tuple(column_offsets(np.array(primes)).tolist()),
        **more,  # type: ignore[arg-type]
    )


def random_table(folder: Path, index: int, record: RecordFormat, keyer: KeyerSpec, num_rows: int) -> TableSpec:
    """Write any bytes as a table: payload and scales in one file, or apart where the index is odd."""
    data = np.random.default_rng(index).integers(0, 256, size=(num_rows, record.record_bytes), dtype=np.uint8)
    if record.columns == 256:
        data = np.arange(256 * record.record_bytes, dtype=np.uint32).view(np.uint8)[: data.size].reshape(data.shape)
    cut = record.payload_bytes if index % 2 and record.num_scales else record.record_bytes
    parts = []
    for part, columns in enumerate((data[:, :cut], data[:, cut:])):
        if columns.size:
            name = f"table{index}-{part}.bin"
            (folder / name).write_bytes(b"head" + columns.tobytes())
            rows = RowRange(first_row=0, num_rows=num_rows, file=name, external=False, offset=4)
            parts.append(TablePart(row_bytes=columns.shape[1], ranges=(rows,)))
    return TableSpec(site=f"site_{index}", num_rows=num_rows, record=record, parts=tuple(parts), keyer=keyer)


def write_tables(folder: Path) -> list[TableSpec]:
    """Write a table of every format, of every keyer, and one whose parts are cut into ranges of many files."""
    every_token = TokenKeyerSpec(vocab_size=TOKENS, pad_id=0)
    tables = [random_table(folder, index, record, every_token, TOKENS) for index, record in enumerate(formats())]
    record = RecordFormat(payload="int8", columns=4, scale="float16", scale_columns=4)
    for keyer in keyers(folder):
        tables.append(random_table(folder, len(tables), record, keyer, keyer.min_rows + 1))
    tables.append(dataclasses.replace(sharded_spec(folder), site="sharded"))
    return tables


class Stub:
    """A program whose logits are rows, and the Python sites that give the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tables = write_tables(folder)
        self.vocab_size = write_stub(folder, self.tables)
        self.sources = [*RUNTIME, folder / "model.c", folder / "manifest.c"]
        self.sites = [Site(table, self._keyer(table.keyer), self._open(table)) for table in self.tables]

    def build(self, way: str) -> CLibrary:
        name = f"{way.replace(' ', '_')}.so"
        return CLibrary(build(self.folder / name, self.sources, "-O1", "-shared", "-fPIC", *WAYS[way]))

    def rows(self, token_ids: list[int]) -> NDArray[np.float32]:
        """Return what Python reads for the last of the tokens, table after table."""
        *history, last = token_ids
        rows = [site.rows(history, np.array([last])).ravel() for site in self.sites]
        return np.concatenate(rows)

    @functools.cached_property
    def first_rows(self) -> list[NDArray[np.float32]]:
        """Return `rows` of the texts of one token."""
        return [self.rows([token_id]) for token_id in range(TOKENS)]

    def _keyer(self, spec: KeyerSpec) -> Keyer:
        mapped = getattr(spec, "token_map", None)
        token_map = None if mapped is None else np.fromfile(self.folder / mapped, dtype="<i4").astype(np.int64)
        return spec.keyer(TOKENS, token_map)

    def _open(self, table: TableSpec) -> PreadTable:
        decoder = NumpyRowDecoder(table.record, [part.row_bytes for part in table.parts])
        return PreadTable.open(table, lambda rows: self.folder / rows.file, decoder)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    return Stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module", params=WAYS)
def library(request: pytest.FixtureRequest, stub: Stub) -> CLibrary:
    return stub.build(request.param)


@pytest.fixture(scope="module")
def pread(stub: Stub) -> CLibrary:
    return stub.build("pread")


def assert_same_bits(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Compare every bit of every number; which nan it is isn't specified."""
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), ~numbers)
    np.testing.assert_array_equal(found.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])


def test_rows_of_every_format_and_keyer_have_the_bits_of_the_python_runtime(library: CLibrary, stub: Stub) -> None:
    with CText(library, stub.folder) as text:
        for token_id, expected in enumerate(stub.first_rows):
            text.reset()
            assert_same_bits(text.step([token_id])[:-TOLD], expected)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    calls=st.lists(st.lists(st.sampled_from([0, 1, 2, 5, 9, 99, 100, 200, 255]), min_size=1, max_size=11), max_size=5)
)
def test_row_ids_don_t_depend_on_how_a_text_is_cut(stub: Stub, pread: CLibrary, calls: list[list[int]]) -> None:
    seen: list[int] = []
    with CText(pread, stub.folder) as text:
        for token_ids in calls:
            seen += token_ids
            logits = text.step(token_ids)
            assert_same_bits(logits[:-TOLD], stub.rows(seen))
            assert len(text) == len(seen) == int(logits[-2])


def test_a_text_is_cut_into_the_largest_passes_first(pread: CLibrary, stub: Stub) -> None:
    with CText(pread, stub.folder) as text:
        assert text.step(range(4))[-TOLD:].tolist() == [0, 4, 4]
        assert text.step(range(5))[-TOLD:].tolist() == [8, 9, 1]
        assert text.step(range(11))[-TOLD:].tolist() == [19, 20, 1]


def test_a_new_text_has_zeroed_states_and_no_history(library: CLibrary, stub: Stub) -> None:
    with CText(library, stub.folder) as text:
        first = text.step([8, 9, 10])
        text.step([11])
        text.reset()
        assert len(text) == 0
        assert_same_bits(text.step([8, 9, 10]), first)


def test_what_is_packed_is_told(pread: CLibrary, stub: Stub) -> None:
    about = pread.about
    assert about.name == b"stub"
    assert (about.vocab_size, about.context_length, about.weights_bytes) == (stub.vocab_size, CONTEXT, 64)
    assert about.end_ids[: about.num_end_ids] == list(END_IDS)
    assert [token_id for token_id in range(stub.vocab_size) if pread.function("ends")(token_id)] == list(END_IDS)


def test_the_likeliest_token_is_the_first_of_the_largest_logits(pread: CLibrary, stub: Stub) -> None:
    logits = np.zeros(stub.vocab_size, dtype=np.float32)
    logits[[7, 9]] = 3, 3
    assert pread.greedy(logits) == 7 == np.argmax(logits)
    logits[0] = np.float32(np.inf)
    with pytest.raises(CError) as raised:
        pread.greedy(logits)
    assert str(raised.value) == "the logit of token id 0 is not finite; check the bundle that was packed"


def test_tokens_that_can_t_be_added_leave_the_text_as_it_was(pread: CLibrary, stub: Stub) -> None:
    errors = []
    with CText(pread, stub.folder) as text:
        text.step(range(60))
        for token_ids in ([], [-1], [4, stub.vocab_size], [1] * 5):
            with pytest.raises(CError) as raised:
                text.step(token_ids)
            errors.append(str(raised.value))
        assert len(text) == 60
        assert text.step([1, 2, 3, 4])[-TOLD:].tolist() == [60, 64, 4]
    assert errors == [
        "no token is given, expected at least one",
        f"token id -1 is outside the vocabulary, expected 0 to {stub.vocab_size - 1}",
        f"token id {stub.vocab_size} is outside the vocabulary, expected 0 to {stub.vocab_size - 1}",
        "the context of 64 has room for 4 more tokens, not for 5; begin another text",
    ]


def copy_data(stub: Stub, folder: Path) -> Path:
    """Copy the files a program reads."""
    for path in stub.folder.iterdir():
        if path.suffix in (".bin", ".int32"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_table_that_is_truncated_meanwhile_ends_the_text_until_the_next(
    pread: CLibrary, stub: Stub, tmp_path: Path
) -> None:
    folder = copy_data(stub, tmp_path)
    table = folder / "table2-0.bin"
    content = table.read_bytes()
    with CText(pread, folder) as text:
        table.write_bytes(content[: len(content) // 2])
        text.step([1])
        with pytest.raises(CError, match=r"^table2-0.bin ends before byte \d+: it was truncated$"):
            text.step([255])
        table.write_bytes(content)
        with pytest.raises(CError) as raised:
            text.step([1])
        assert str(raised.value) == "the text was ended by an error; begin another one with engram_reset"
        text.reset()
        assert text.step([255])[-TOLD:].tolist() == [0, 1, 1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_first(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (Path.unlink, "weights.bin", "weights.bin can't be opened in {folder}: No such file or directory"),
        (make_folder, "weights.bin", "weights.bin is not a plain file; copy it again"),
        (truncate, "weights.bin", "weights.bin holds 63 bytes, 64 were packed; copy it again"),
        (truncate, "map.int32", "map.int32 holds 1023 bytes, 1024 were packed; copy it again"),
        (change_first, "table0-0.bin", "table0-0.bin is not the file that was packed with this program; copy it again"),
    ],
)
def test_another_file_than_was_packed_is_refused(
    damage: Callable[[Path], None], file: str, message: str, pread: CLibrary, stub: Stub, tmp_path: Path
) -> None:
    damage(copy_data(stub, tmp_path) / file)
    with pytest.raises(CError) as raised:
        CText(pread, tmp_path)
    assert str(raised.value) == message.format(folder=tmp_path)


def test_damage_behind_the_first_64_kib_is_found_by_verifying(pread: CLibrary, stub: Stub, tmp_path: Path) -> None:
    path = copy_data(stub, tmp_path) / "table24-0.bin"
    content = path.read_bytes()
    pread.verify(tmp_path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    CText(pread, tmp_path).__exit__()
    with pytest.raises(CError) as raised:
        pread.verify(tmp_path)
    assert str(raised.value) == (
        "table24-0.bin is damaged: its SHA-256 is another one than when it was packed; copy it again"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__",), "weights and tables are little-endian, this machine is not"),
        (("-mfpmath=387",), "floats must be computed as floats: on 32-bit x86 add -msse2 -mfpmath=sse"),
    ],
)
@pytest.mark.skipif(machine() != "x86_64", reason="asks for x87 arithmetic")
def test_a_machine_that_would_compute_something_else_is_refused_by_the_compiler(
    flags: tuple[str, ...], message: str
) -> None:
    code, _, said = run(["gcc", "-fsyntax-only", "-Wno-builtin-macro-redefined", *flags, SOURCES / "hash.c"])
    assert code == 1
    assert f'error: #error "{message}"' in said


def test_the_program_in_the_documents_can_be_built(stub: Stub, tmp_path: Path) -> None:
    (code,) = re.findall(r"```c\n(.*?)```", EMBEDDED, re.DOTALL)
    (tmp_path / "own.c").write_text(code)
    program = build(tmp_path / "own", [*stub.sources, tmp_path / "own.c"], "-O0")
    message = "weights.bin can't be opened in /opt/demo: No such file or directory\n"
    assert run([program]) == (1, "", message)


def test_every_function_is_in_the_documents() -> None:
    declared = re.findall(r"^(?:\w+ )+\*?(engram_\w+)\(", (SOURCES / "engram.h").read_text(), re.MULTILINE)
    assert sorted(declared) == sorted(re.findall(r"^\| `(engram_\w+)` \|", EMBEDDED, re.MULTILINE))


def test_any_name_of_a_model_is_a_c_string(tmp_path: Path) -> None:
    name = 'a "quoted"\\ name\nof two lines??/ with Umläuten 日本語1'
    write_stub(tmp_path, [], name=name)
    sources = [*RUNTIME, tmp_path / "model.c", tmp_path / "manifest.c"]
    library = CLibrary(build(tmp_path / "named.so", sources, "-O0", "-shared", "-fPIC"))
    assert library.about.name.decode() == name


class Speaker:
    """A program whose rows are finite, so that its greedy text can be told, built with checks of what it does."""

    def __init__(self, folder: Path) -> None:
        record = RecordFormat(payload="int8", columns=64, scale="none", scale_columns=64)
        keyer = ngram_keyer((2, 3), 2, pad_id=0)
        self.table = random_table(folder, 0, record, keyer, keyer.min_rows)
        self.folder = folder
        write_stub(folder, [self.table], end_ids=RARE_IDS)
        sources = [*RUNTIME, SOURCES / "main.c", folder / "model.c", folder / "manifest.c"]
        self.path = build(folder / "engram", sources, "-O1", *SANITIZED)

    def answer(self, prompt: list[int], most: int) -> list[int]:
        """Return the ids that follow a prompt: up to ``most``, an end id, or the end of the context."""
        spec = self.table
        decoder = NumpyRowDecoder(spec.record, [part.row_bytes for part in spec.parts])
        site = Site(
            spec, spec.keyer.keyer(256, None), PreadTable.open(spec, lambda rows: self.folder / rows.file, decoder)
        )
        seen = list(prompt)
        while True:
            rows = site.rows(seen[:-1], np.array(seen[-1:])).ravel()
            added = 4 if len(seen) == len(prompt) and len(seen) % 4 == 0 else 1
            seen.append(int(np.argmax(np.concatenate([rows, [len(seen) - added, len(seen), added]]))))
            if len(seen) - len(prompt) == most or seen[-1] in RARE_IDS or len(seen) == CONTEXT + 1:
                return seen[len(prompt) :]


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    return Speaker(tmp_path_factory.mktemp("speaker"))


@pytest.mark.parametrize("seed", range(4))
def test_the_command_prints_the_ids_that_follow(speaker: Speaker, seed: int) -> None:
    prompt = np.random.default_rng(seed).integers(0, 256, size=1 + 5 * seed).tolist()
    expected = speaker.answer(prompt, 20)
    texts = list(map(str, prompt))
    answers = [
        run([speaker.path, "-d", speaker.folder, "-n", "20", *texts]),
        run([speaker.path, "-d", speaker.folder, "-n", "20"], given="\n".join(texts)),
    ]
    assert answers == [(0, " ".join(map(str, expected)) + "\n", "")] * 2


def test_the_command_ends_with_an_end_id_or_with_the_context(speaker: Speaker) -> None:
    answers = [speaker.answer(prompt, 1000) for prompt in ([42, 43, 44], [1, 2, 3])]
    assert answers[0][-1] in RARE_IDS
    assert (len(answers[0]) < 62, len(answers[1])) == (True, CONTEXT + 1 - 3)
    printed = [run([speaker.path, "-d", speaker.folder, "-n", "1000", *ids.split()]) for ids in ("42 43 44", "1 2 3")]
    assert printed == [(0, " ".join(map(str, answer)) + "\n", "") for answer in answers]


def test_the_command_says_how_long_it_took_and_how_much_memory(speaker: Speaker) -> None:
    code, _, said = run([speaker.path, "-d", speaker.folder, "-n", "3", "--time", "1", "2"])
    assert code == 0
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"prefill 2 tokens in {number} s, {number} tok/s\ndecode 2 tokens in {number} s, {number} tok/s\n"
        rf"VmHWM:\s+\d+ kB\nRssAnon:\s+\d+ kB\nRssFile:\s+\d+ kB\n",
        said,
    )


def test_states_take_memory_as_they_are_used(tmp_path: Path) -> None:
    write_stub(tmp_path, [], state_bytes=1 << 30, end_ids=())
    sources = [*RUNTIME, SOURCES / "main.c", tmp_path / "model.c", tmp_path / "manifest.c"]
    code, _, said = run([build(tmp_path / "engram", sources, "-O1"), "-d", tmp_path, "--time", "1"])
    assert code == 0
    peak, anonymous = (int(re.search(rf"{name}:\s+(\d+) kB", said)[1]) for name in ("VmHWM", "RssAnon"))  # type: ignore[index]
    assert anonymous < 1 << 10
    assert peak < 4 << 10


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--verify"], 0, ""),
        (
            ["-d", "/nowhere", "--verify"],
            1,
            "engram: weights.bin can't be opened in /nowhere: No such file or directory\n",
        ),
        (["-d", "/nowhere", "1"], 1, "engram: weights.bin can't be opened in /nowhere: No such file or directory\n"),
        (["259"], 1, "engram: token id 259 is outside the vocabulary, expected 0 to 258\n"),
        (["7"] * 65, 1, "engram: the context of 64 has room for 64 more tokens, not for 65; begin another text\n"),
        ([], 1, "engram: no token is given, expected at least one\n"),
        (["x"], 2, "engram: 'x' is not a token id, expected a number from 0\n{usage}"),
        (["99999999999"], 2, "engram: '99999999999' is not a token id, expected a number from 0\n{usage}"),
        (["-n", "0", "1"], 2, "{usage}"),
        (["-n"], 2, "{usage}"),
        (["--help"], 2, "{usage}"),
    ],
)
def test_the_command_refuses_what_it_can_t_do(speaker: Speaker, arguments: list[str], code: int, said: str) -> None:
    usage = dedent(
        """\
        usage: engram [-d FOLDER] [-n N] [--time] [--verify] [ID ...]
        Continue a text given as token ids, or as lines of them on standard input, and print the ids that follow.
          -d FOLDER  where weights.bin and tables/ are (.)
          -n N       how many ids to print at most (32); an id that ends the answer is the last one
          --time     say afterwards how long it took and how much memory
          --verify   compare all files with what was packed, and end
        """
    )
    assert run([speaker.path, "-d", speaker.folder, *arguments]) == (code, "", said.format(usage=usage))
