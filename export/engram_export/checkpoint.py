"""Open a model as others publish it: a folder of safetensors in the Hugging Face layout, or a GGUF file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engram_export.listed_tensors import ListedTensors
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards
from engram_export.source_files import parse_json_object, read_small_file
from engram_runtime.errors import CheckpointError

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors")  # a bare name: no folder, no parent
MAX_JSON_BYTES = 64 << 20  # tokenizer.json of a 260 000 token vocabulary is 35 MB
CARD_FILE, MAX_FRONT_MATTER_BYTES = "README.md", 64 << 10
FRONT_MATTER = re.compile(r"---\r?\n(.*?\n)---\r?$", re.DOTALL | re.MULTILINE)
LICENSE_LINE = re.compile(r"^license:[ \t]*[\"']?([^\"'\s]+)[\"']?[ \t]*\r?$", re.MULTILINE)
LICENSE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # such as apache-2.0
MAX_TEMPLATE_BYTES = 1 << 20  # the longest published chat templates are 20 kB

T = TypeVar("T", str, int, float, bool, list[Any], dict[str, Any])


class TensorSource(Protocol):
    """Named tensors of which only the names and shapes are in memory."""

    def names(self) -> list[str]:
        """List the tensors in the order of the file."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a whole tensor, converted to float32, as a fresh array."""

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Read ``[stop - start, ...]`` rows of the first axis, fresh; only their bytes are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's weights and everything that is written beside them."""

    config: dict[str, Any]  # as in Hugging Face's config.json
    tensors: TensorSource
    tokenizer_json: bytes | None
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_template: str | None
    source: str  # name of the file or folder
    path: Path
    license: str | None = None  # as its makers name it

    def require(self, key: str, kind: type[T]) -> T:
        """Return a value of the config that the model cannot do without; an int passes for a float."""
        if key not in self.config:
            raise CheckpointError(f"{self.config_name} has no {key!r}; the checkpoint is incomplete")
        value = self.config[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(
                f"{key!r} in {self.config_name} is {value!r}, wanted {kind.__name__}; correct the config"
            )
        return value

    @property
    def config_name(self) -> str:
        """Where a value of the config can be looked up."""
        return f"{CONFIG_FILE} of {self.source}" if self.path.is_dir() else f"the metadata of {self.source}"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors, a .gguf file, or a folder whose only model is a .gguf file.

    Code in the folder is never run: ``auto_map`` is ignored and pickles are refused.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a folder with config.json or a .gguf file")
    if path.is_dir():
        return _open_folder(path) if (path / CONFIG_FILE).exists() else _open_gguf(_only_gguf(path))
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise _pickle_refused(path)
    raise CheckpointError(f"{path} is neither a folder nor a .gguf file; give the folder that holds config.json")


def _open_gguf(path: Path) -> Checkpoint:
    try:
        from engram_export.gguf_file import open_gguf  # gguf is not needed to read safetensors
    except ModuleNotFoundError as err:
        raise CheckpointError(f"reading {path} needs the gguf package: pip install 'engram-edge[export]'") from err
    return open_gguf(path)


def _only_gguf(folder: Path) -> Path:
    found = sorted(folder.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder} holds {len(found)} .gguf files and no {CONFIG_FILE}; give one of the files")
    raise CheckpointError(f"{folder} holds neither {CONFIG_FILE} nor a .gguf file; give a model's folder")


def open_listed(path: Path) -> Checkpoint:
    """Open a model as `open_checkpoint` does, or a folder that lacks shards by its config and index alone."""
    if not (path / INDEX_FILE).is_file() or not (path / CONFIG_FILE).is_file():
        return open_checkpoint(path)
    index = _read_json(path / INDEX_FILE)
    shards = _weight_map(path / INDEX_FILE, index)
    if all((path / shard).exists() for shard in set(shards.values())):
        return open_checkpoint(path)
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return _open_folder(path, lambda _: ListedTensors(list(shards), total if type(total) is int else None))


def _open_folder(folder: Path, open_weights: Callable[[Path], TensorSource] | None = None) -> Checkpoint:
    tokenizer_config = _read_json(folder / "tokenizer_config.json", optional=True)
    tokenizer_json = folder / "tokenizer.json"
    return Checkpoint(
        config=_read_json(folder / CONFIG_FILE),
        tensors=(open_weights or _open_weights)(folder),
        tokenizer_json=read_small_file(tokenizer_json, MAX_JSON_BYTES) if tokenizer_json.exists() else None,
        tokenizer_config=tokenizer_config,
        generation_config=_read_json(folder / "generation_config.json", optional=True),
        chat_template=_chat_template(folder, tokenizer_config),
        source=folder.resolve().name,
        path=folder,
        license=stated_license(folder),
    )


def stated_license(folder: Path) -> str | None:
    """Return the license that the front matter of a folder's card states, None without a card or a plain name in it."""
    card = folder / CARD_FILE
    if not card.is_file():
        return None
    with card.open("rb") as stream:
        text = stream.read(MAX_FRONT_MATTER_BYTES).decode("utf-8", errors="replace")
    front = FRONT_MATTER.match(text)
    stated = LICENSE_LINE.search(front[1]) if front else None
    return license_name(stated[1]) if stated else None


def license_name(value: object) -> str | None:
    """Return a value of a checkpoint if it is the name of a license, None for anything else."""
    return value if isinstance(value, str) and LICENSE_NAME.fullmatch(value) else None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.exists():
        return {}
    return parse_json_object(read_small_file(path, MAX_JSON_BYTES), str(path))


def _open_weights(folder: Path) -> TensorSource:
    if (folder / INDEX_FILE).exists():
        return _open_shards(folder)
    found = sorted(folder.glob("*.safetensors"))
    if folder / WEIGHTS_FILE in found:
        return SafetensorsFile(folder / WEIGHTS_FILE)
    if len(found) == 1:
        return SafetensorsFile(found[0])
    if found:
        raise CheckpointError(f"{folder} holds {len(found)} safetensors files but no {INDEX_FILE}; download the index")
    if pickles := sorted(file for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES):
        raise _pickle_refused(pickles[0])
    raise CheckpointError(f"{folder} holds no weights, wanted {WEIGHTS_FILE}; download the model's safetensors files")


def _open_shards(folder: Path) -> SafetensorsShards:
    index = folder / INDEX_FILE
    weight_map = _weight_map(index, _read_json(index))
    files = {shard: SafetensorsFile(folder / shard) for shard in sorted(set(weight_map.values()))}
    held = {shard: frozenset(file.names()) for shard, file in files.items()}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise CheckpointError(
                f"{index} places tensor {name!r} in {shard}, which does not hold it; download both again"
            )
    return SafetensorsShards({name: files[shard] for name, shard in weight_map.items()})


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    """Return the shard of each tensor by its name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map' object; download the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path} places tensor {name!r} in {shard!r}, wanted a .safetensors file of the same folder; "
                f"download the index again"
            )
    return weight_map


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return _decode(file, read_small_file(file, MAX_TEMPLATE_BYTES))
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named templates
        templates = [entry.get("template") for entry in template if _is_default(entry)]
        template = templates[-1] if templates else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(
            f"'chat_template' in {folder / 'tokenizer_config.json'} is not a string; correct the file"
        )
    return template


def _is_default(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("name") == "default"


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise CheckpointError(f"{path} is not utf-8 at byte {err.start}; save it as utf-8") from err


def _pickle_refused(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle, which can run code when it is read; convert the model to safetensors and give that folder"
    )
