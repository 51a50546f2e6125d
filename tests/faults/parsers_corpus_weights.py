"""A4: GGUF, ONNX and safetensors files as known attacks had them; see `tests.faults.parsers_corpus`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from tests.faults import parsers_checkpoint as checkpoints
from tests.faults.parsers_gguf import ARRAY, STRING, U32, Document, sound_document, use_gguf

from engram_compilers.onnx_model import read_onnx_model
from engram_runtime.onnx_places import check_places

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
    "onnx no message": lambda folder: check_places(written(folder / "g.onnx", b"\x3b{}"), written(folder / "w", b"x")),
}


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _safetensors(header: object, data: bytes = bytes(64), *, length: int | None = None) -> Case:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()

    def case(folder: Path) -> None:
        checkpoints._use_safetensors(written(folder / "a.safetensors", checkpoints.with_length(text, data, length)))

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
