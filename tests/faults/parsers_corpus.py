"""A4: files as known attacks had them, made here: each is refused with its own text, `corpus/expected.json` says which.

After a change of a text: `python -m tests.faults.parsers_corpus` writes the table anew; read what changed.
"""

import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from tests.faults.parsers_checkpoint import ENGRAM
from tests.faults.parsers_corpus_weights import GGUFS, GRAPHS, SAFETENSORS, Case, written
from tests.faults.parsers_formats import CORPUS, DEVICES
from tests.faults.parsers_json import LIBRARY, use_bundle
from tests.faults.parsers_survey import scratch
from tests.faults.parsers_tokenizer import sound_tokenizer
from tests.faults.row import Outcome, Row
from tests.test_bundle import TABLE, WEIGHTS, change_manifest, write_bundle

from engram_compilers.onnx_model import read_onnx_model
from engram_export.checkpoint import open_checkpoint
from engram_export.engram_config import EngramConfig
from engram_runtime.bundle import Bundle
from engram_runtime.chat import ChatTemplate
from engram_runtime.errors import EngramError
from engram_runtime.library import LibraryInfo
from engram_runtime.npu.devices import open_device
from engram_runtime.tokenizer import TextTokenizer

EXPECTED = CORPUS / "expected.json"


def _manifest(*path: str | int, value: object) -> Case:
    """Return a case of a bundle with one value of its manifest changed."""

    def case(folder: Path) -> None:
        root = write_bundle(folder / "bundle")
        change_manifest(root, *path, value=value)
        use_bundle(root)

    return case


def _library(**changes: object) -> Case:
    return lambda folder: LibraryInfo.from_dict({**LIBRARY, **changes})


def _linked(relative: str) -> Case:
    def case(folder: Path) -> None:
        root = write_bundle(folder / "bundle")
        (root / relative).unlink()
        (root / relative).symlink_to(written(folder / "secret", b"secret"))
        Bundle.open(root)

    return case


BUNDLES: Mapping[str, Case] = {
    "CVE-2024-37032 path of a file": _manifest("files", 0, "path", value="../../etc/passwd"),
    "CVE-2026-7020 absolute path of a table": _manifest(
        *("tables", 0, "parts", 0, "ranges", 0, "file"), value="/etc/passwd"
    ),
    "CVE-2026-27489 link for the weights": _linked(WEIGHTS),
    "CVE-2026-27489 link for the manifest": _linked("engram.json"),
    "CVE-2025-0315 memory of a state": _manifest(
        *("graphs", "decoder", "states", 0, "shape"), value=[2**20, 2**20, 32, 4]
    ),
    "CVE-2026-21869 negative offset": _manifest("tables", 0, "parts", 0, "ranges", 0, "offset", value=-1),
    "row beyond the file": _manifest("tables", 0, "parts", 0, "ranges", 0, "offset", value=2**40),
    "multiplier that overflows": _manifest("tables", 0, "keyer", "multipliers", value=[2**63 - 1, 5, 7]),
    "newer format": _manifest("format_version", value=99),
    "names that differ in case": _manifest("files", 4, "path", value=TABLE.upper()),
    "packed tensor beyond the weights": _library(weights_bytes=64),
    "library elsewhere": _library(library="../decoder.so"),
    "wide file for a token map": _manifest("tables", 0, "keyer", "token_map", value=TABLE),
}


def _tokenizer(change: Callable[[dict[str, Any]], object]) -> Case:
    def case(folder: Path) -> None:
        document = json.loads(sound_tokenizer())
        change(document)
        written(folder / "tokenizer.json", json.dumps(document).encode())
        TextTokenizer.load(folder).encode("a" * 60 + "!")

    return case


def _set_part(name: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.__setitem__(name, value)


def _template(source: str) -> Case:
    return lambda folder: ChatTemplate(source, {}).render([{"role": "user", "content": "a"}])


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SLOW = {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}
TEXTS: Mapping[str, Case] = {
    "tokenizers 2198 merge of unknown tokens": _tokenizer(
        lambda document: document["model"]["merges"].append(["a", "zz"])
    ),
    "tokenizers 2060 expression without end": _tokenizer(_set_part("pre_tokenizer", SLOW)),
    "tokenizers steps that double the text": _tokenizer(
        _set_part("pre_tokenizer", {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 100})
    ),
    "tokenizers long expressions": _tokenizer(
        _set_part("normalizer", {"type": "Replace", "pattern": {"Regex": "(a|b)" * 20_000}, "content": ""})
    ),
    "tiktoken 245 prompt of one character": lambda folder: _tokenizer_of(folder).encode("^" * 5_000_000),
    "CVE-2025-52566 prompt with half a character": lambda folder: _tokenizer_of(folder).encode("a\ud800"),
    "CVE-2024-34359 template that imports": _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "CVE-2024-56326 format by reference": _template("{{ ('{0.__class__}'|attr('format'))(1) }}"),
    "CVE-2025-27516 attr filter": _template("{{ ''|attr('__class__') }}"),
    "CVE-2026-5760 template that runs a command": _template("{{ cycler.__init__.__globals__.os.popen('id').read() }}"),
    "CVE-2025-62426 template without end": _template("{% for i in range(10**9) %}{% endfor %}"),
}


def _tokenizer_of(folder: Path) -> TextTokenizer:
    written(folder / "tokenizer.json", sound_tokenizer())
    return TextTokenizer.load(folder)


def _pickle(folder: Path) -> None:
    written(folder / "config.json", b"{}")
    written(folder / "pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    open_checkpoint(folder)


def _checkpoint(name: str, content: object) -> Case:
    def case(folder: Path) -> None:
        written(folder / "config.json", b"{}")
        written(folder / name, json.dumps(content).encode())
        open_checkpoint(folder)

    return case


def _constant(**fields: Any) -> Case:
    """Return a case of a graph with one constant."""

    def case(folder: Path) -> None:
        graph = onnx.GraphProto(name="g", initializer=[onnx.TensorProto(name="c", **fields)])
        model = onnx.ModelProto(ir_version=10, graph=graph).SerializeToString()
        read_onnx_model(written(folder / "decoder.onnx", model), written(folder / "weights.bin", bytes(64)))

    return case


def _stream(folder: Path) -> None:
    stream = (CORPUS / "systolic.stream").read_bytes()
    open_device(DEVICES["systolic"]).load(stream[:36] + struct.pack("<I", 2**32 - 1) + stream[40:])


OTHERS: Mapping[str, Case] = {
    "CVE-2025-32434 pickle": _pickle,
    "Hugging Face index, shard elsewhere": _checkpoint(
        "model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}}
    ),
    "command stream that says it is longer": _stream,
}
# What this suite found in this project, mended since.
FOUND: Mapping[str, Case] = {
    "found: shard whose name no disk takes": _checkpoint(
        "model.safetensors.index.json", {"weight_map": {"a": "a" * 300 + ".safetensors"}}
    ),
    "found: engram block of a layer below the first": lambda folder: EngramConfig.from_dict(
        {**ENGRAM, "layer_index_base": 2}
    ),
    "found: constant of another size than its shape": _constant(data_type=1, dims=[4], raw_data=b"1234567"),
    "found: constant of no type": _constant(data_type=0, dims=[1], raw_data=b"1"),
    "found: constant with a negative dimension": _constant(data_type=1, dims=[-1, -4], raw_data=bytes(16)),
    "found: template with a number beyond all numbers": _template("{{ [1e999] }}"),
}
CASES: Mapping[str, Case] = {**GGUFS, **GRAPHS, **SAFETENSORS, **BUNDLES, **TEXTS, **OTHERS, **FOUND}


def found_texts() -> Iterator[tuple[str, str]]:
    """Yield each case's name and the class and text of its error, with FOLDER for where its file is."""
    for name, case in CASES.items():
        text = "taken"
        with scratch() as folder, contextlib.redirect_stderr(None):
            try:
                case(folder)
            except EngramError as error:
                text = f"{type(error).__name__}: {str(error).replace(str(folder), 'FOLDER')}"
        yield name, text


def known_files(count: int) -> Outcome:
    """Make and use every file of the corpus."""
    expected = json.loads(EXPECTED.read_text())
    found = dict(found_texts())
    failures = [f"{name}: {text}" for name, text in found.items() if text != expected.get(name) or text == "taken"]
    return Outcome(tried=len(found), survived=len(found) - len(failures), failures=tuple(failures[:20]))


ROWS = (
    Row(
        name="A4",
        fault="files as known attacks had them, one for each of the faults that other projects had",
        expected="each refused with its own text",
        quick=40,
        full=40,
        run=known_files,
    ),
)

if __name__ == "__main__":
    EXPECTED.write_text(json.dumps(dict(found_texts()), indent=1) + "\n")
