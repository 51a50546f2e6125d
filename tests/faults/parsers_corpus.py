"""A4: files as known attacks had them, made here: each is refused with its own text, `corpus/expected.json` says which.

After a change of a text: `python -m tests.faults.parsers_corpus` writes the table anew; read what changed.
"""

import contextlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from tests.faults import parsers_checkpoint as checkpoints
from tests.faults.parsers_formats import CORPUS, DEVICES
from tests.faults.parsers_gguf import ARRAY, STRING, U32, Document, sound_document, use_gguf
from tests.faults.parsers_json import LIBRARY, use_bundle
from tests.faults.parsers_survey import scratch
from tests.faults.parsers_tokenizer import sound_tokenizer
from tests.faults.row import Outcome, Row
from tests.test_bundle import TABLE, WEIGHTS, change_manifest, write_bundle

from engram_compilers.onnx_model import read_onnx_model
from engram_export.checkpoint import open_checkpoint
from engram_runtime.bundle import Bundle
from engram_runtime.chat import ChatTemplate
from engram_runtime.errors import EngramError
from engram_runtime.library import LibraryInfo
from engram_runtime.npu.devices import open_device
from engram_runtime.onnx_places import check_places
from engram_runtime.tokenizer import TextTokenizer

EXPECTED = CORPUS / "expected.json"
Case = Callable[[Path], object]  # makes the file in a folder and uses it


def _gguf(change: Callable[[Document], object], *, cut: int | None = None) -> Case:
    """Return a case of a GGUF file that a change of the sound one makes."""

    def case(folder: Path) -> None:
        document = sound_document("llama", "gpt2")
        change(document)
        path = folder / "model.gguf"
        path.write_bytes(document.to_bytes()[:cut])
        use_gguf(path)

    return case


def _set_tensor(place: int, value: object) -> Callable[[Document], object]:
    return lambda document: document.infos[3].__setitem__(place, value)


def _set_entry(key: str, kind: int, value: object) -> Callable[[Document], object]:
    def change(document: Document) -> None:
        document.entries = [each for each in document.entries if each[0] != key] + [[key, kind, value]]

    return change


def _set_counts(tensors: int | None, entries: int | None) -> Callable[[Document], object]:
    return lambda document: setattr(document, "counts", [tensors, entries])


GGUFS: Mapping[str, Case] = {
    "CVE-2025-53630 product of dimensions": _gguf(_set_tensor(1, [2**32, 2**32])),
    "CVE-2026-27940 offset and size beyond 64 bits": _gguf(_set_tensor(3, 2**64 - 32)),
    "CVE-2026-7482 tensor beyond the file": _gguf(_set_tensor(1, [64, 2**20])),
    "CVE-2024-21802 number of axes": _gguf(_set_tensor(1, [1] * 5)),
    "CVE-2024-21825 number of tensors": _gguf(_set_counts(2**60, None)),
    "CVE-2024-21836 number of entries": _gguf(_set_counts(None, 2**61)),
    "CVE-2024-23496 length of a string": _gguf(_set_entry("x" * 9, 9, [STRING, 2**62, []])),
    "CVE-2024-23605 length of an array": _gguf(_set_entry("x", ARRAY, [U32, 2**62, []])),
    "llama.cpp 19856 negative type of a tensor": _gguf(_set_tensor(2, 2**32 - 1)),
    "llama.cpp 19856 arrays in arrays": _gguf(_set_entry("x", ARRAY, [ARRAY, 1, [[U32, None, [1]]]])),
    "llama.cpp 6774 file cut short": _gguf(lambda document: None, cut=4000),
    "llama.cpp alignment of zero": _gguf(_set_entry("general.alignment", U32, 0)),
    "llama.cpp offset that isn't aligned": _gguf(_set_tensor(3, 33)),
    "llama.cpp key twice": _gguf(lambda document: document.entries.append(document.entries[0])),
    "llama.cpp tensor twice": _gguf(lambda document: document.infos.append(document.infos[0])),
    "llama.cpp tensors that overlap": _gguf(_set_tensor(3, 0)),
    "llama.cpp text that isn't UTF-8": _gguf(_set_entry("x", STRING, b"\xff\xfe")),
    "CVE-2025-49847 token beyond the vocabulary": _gguf(_set_entry("tokenizer.ggml.bos_token_id", U32, 2**31)),
    "tokenizers 2094 merge of unknown tokens": _gguf(
        _set_entry("tokenizer.ggml.merges", ARRAY, [STRING, None, ["a zz"]])
    ),
    "Ollama GO-2025 vocabulary beyond the embedding": _gguf(
        _set_entry("tokenizer.ggml.tokens", ARRAY, [STRING, None, [f"t{index}" for index in range(99)]])
    ),
}


def _onnx(places: Sequence[tuple[str, str]], *, inner: bool = False, read: bool = False) -> Case:
    """Return a case of a tensor that is said to lie at places, as a bundle's graph or as the compilers read it."""

    def case(folder: Path) -> None:
        tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
        for key, value in places:
            tensor.external_data.add(key=key, value=value)
        graph = onnx.GraphProto(name="g", initializer=[tensor])
        if inner:  # in a graph within a node
            attribute = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH, g=graph)
            graph = onnx.GraphProto(name="outer", node=[onnx.NodeProto(op_type="If", attribute=[attribute])])
        path, weights = folder / "decoder.onnx", folder / "weights.bin"
        path.write_bytes(onnx.ModelProto(ir_version=10, graph=graph).SerializeToString())
        weights.write_bytes(bytes(64))
        (read_onnx_model if read else check_places)(path, weights)

    return case


def _place(location: str = "weights.bin", offset: str = "0", length: str = "16", **more: str) -> list[tuple[str, str]]:
    return [("location", location), ("offset", offset), ("length", length), *more.items()]


GRAPHS: Mapping[str, Case] = {
    "CVE-2022-25882 location with parents": _onnx(_place("../../../etc/passwd")),
    "CVE-2022-25882 location with parents, compiled": _onnx(_place("../../../etc/passwd"), read=True),
    "CVE-2024-27318 location with parents within": _onnx(_place("a/../../etc/passwd")),
    "CVE-2024-5187 absolute location": _onnx(_place("/etc/passwd")),
    "CVE-2026-34445 key that is an attribute": _onnx(_place(__class__="x")),
    "CVE-2025-51480 place said twice": _onnx([*_place(), ("location", "/etc/passwd")]),
    "onnxruntime 28709 address of memory": _onnx(_place("*/_ORT_MEM_ADDR_/*", "140000000000000")),
    "onnxruntime 26776 location in a graph within": _onnx(_place("../x"), inner=True),
    "onnx negative offset": _onnx(_place(offset="-4096")),
    "onnx offset beyond the file": _onnx(_place(offset="64")),
    "onnx length that isn't the tensor's, compiled": _onnx(_place(length="64"), read=True),
    "onnx offset in other digits": _onnx(_place(offset="\u0663")),
    "onnx no message": lambda folder: check_places(
        _written(folder / "g.onnx", b"\x3b{}"), _written(folder / "w", b"x")
    ),
}


def _written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _safetensors(header: object, data: bytes = bytes(64), *, length: int | None = None) -> Case:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def case(folder: Path) -> None:
        checkpoints._use_safetensors(_written(folder / "a.safetensors", checkpoints.with_length(text, data, length)))

    return case


def _entry(start: int = 0, end: int = 64, shape: Sequence[int] = (16,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


SAFETENSORS: Mapping[str, Case] = {
    "safetensors length of the header": _safetensors({"a": _entry()}, length=2**63),
    "safetensors header of 100 MB": _safetensors({"a": _entry()}, length=100_000_000),
    "safetensors tensors that overlap": _safetensors({"a": _entry(), "b": _entry(32, 96)}, bytes(96)),
    "safetensors hole": _safetensors({"a": _entry(), "b": _entry(68, 132)}, bytes(132)),
    "safetensors 100,001 tensors": _safetensors({f"t{i}": _entry(0, 0, (0,)) for i in range(100_001)}, b""),
    "safetensors product of dimensions": _safetensors({"a": _entry(0, 64, (2**32, 2**32, 16))}),
    "safetensors negative dimension": _safetensors({"a": _entry(0, 64, (-4, -4))}),
    "safetensors tensor beyond the file": _safetensors({"a": _entry(0, 128, (32,))}),
    "safetensors tensor twice": _safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(_entry()).encode(),) * 2)),
    "safetensors nested header": _safetensors(b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


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
        (root / relative).symlink_to(_written(folder / "secret", b"secret"))
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
        _written(folder / "tokenizer.json", json.dumps(document).encode())
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
    _written(folder / "tokenizer.json", sound_tokenizer())
    return TextTokenizer.load(folder)


def _pickle(folder: Path) -> None:
    _written(folder / "config.json", b"{}")
    _written(folder / "pytorch_model.bin", b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    open_checkpoint(folder)


def _shard(folder: Path) -> None:
    _written(folder / "config.json", b"{}")
    _written(folder / "model.safetensors.index.json", b'{"weight_map": {"a": "../../x.safetensors"}}')
    open_checkpoint(folder)


def _stream(folder: Path) -> None:
    stream = (CORPUS / "systolic.stream").read_bytes()
    open_device(DEVICES["systolic"]).load(stream[:36] + struct.pack("<I", 2**32 - 1) + stream[40:])


OTHERS: Mapping[str, Case] = {
    "CVE-2025-32434 pickle": _pickle,
    "Hugging Face index, shard elsewhere": _shard,
    "command stream that says it is longer": _stream,
}
CASES: Mapping[str, Case] = GGUFS | GRAPHS | SAFETENSORS | BUNDLES | TEXTS | OTHERS  # type: ignore[operator]


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
