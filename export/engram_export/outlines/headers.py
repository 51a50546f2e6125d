"""What the headers of a checkpoint say of its tensors, or its config where the files aren't there."""

from pathlib import Path

from engram_export.checkpoint import Checkpoint, TensorSource
from engram_export.listed_tensors import ListedTensors
from engram_export.safetensors_file import SafetensorsFile, SafetensorsShards

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BFLOAT16 = "BF16"


def stated_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that the config says weights have, as headers spell it; float32 where it says nothing."""
    stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype", "float32"))
    return DTYPES.get(str(stated), "F32")


def dtype_of(tensors: TensorSource, name: str, otherwise: str) -> tuple[str, Path | None]:
    """Return a tensor's dtype and file; ``otherwise`` and None where its file isn't there."""
    if isinstance(tensors, SafetensorsFile | SafetensorsShards):
        return tensors.dtype(name), tensors.locate(name)[0]
    return otherwise, None


def weights_are_bfloat16(checkpoint: Checkpoint) -> bool:
    """Return whether all matrices but tables are bfloat16."""
    tensors = checkpoint.tensors
    if isinstance(tensors, ListedTensors):
        return stated_dtype(checkpoint) == BFLOAT16
    if not isinstance(tensors, SafetensorsFile | SafetensorsShards):
        return False
    return {tensors.dtype(name) for name in tensors.names() if len(tensors.shape(name)) == 2} == {BFLOAT16}


def source_bytes(checkpoint: Checkpoint) -> int | None:
    """Return what all tensors take in their files, None where an index doesn't tell."""
    tensors = checkpoint.tensors
    if isinstance(tensors, ListedTensors):
        return tensors.total_bytes
    if isinstance(tensors, SafetensorsFile | SafetensorsShards):
        return sum(tensor_bytes(tensors, name) for name in tensors.names())
    return checkpoint.path.stat().st_size


def tensor_bytes(tensors: SafetensorsFile | SafetensorsShards, name: str) -> int:
    """Return the bytes of a tensor."""
    _, entry = tensors.locate(name)
    return entry.stop - entry.start


def largest_file(checkpoint: Checkpoint) -> Path | None:
    """Return the file with most bytes of weights, None where none is there."""
    if isinstance(checkpoint.tensors, ListedTensors):
        return None
    if checkpoint.path.is_file():
        return checkpoint.path
    files = [*checkpoint.path.glob("*.safetensors"), *checkpoint.path.glob("*.gguf")]
    return max(files, key=lambda file: file.stat().st_size)
