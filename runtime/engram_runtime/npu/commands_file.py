"""The file of a library that holds the command streams of an accelerator, and whose they are.

Little-endian: the magic, the length of a JSON header in 8 bytes, the header, the streams one after the other.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engram_runtime.errors import BundleError, TargetError
from engram_runtime.npu.device import AGAIN, Geometry
from engram_runtime.npu.devices import parse_geometry
from engram_runtime.strict_json import Fields, parse_json_object

# Global functions of the process that a library calls with the places of a stream and a layer in its file as the last
# arguments before the result, and before them:
MULTIPLY = "engram.npu.multiply"  # planes i8 [R, Kp], weight u8 [B]; -> sums i32 [R, N]
MULTIPLY_EXPERTS = "engram.npu.multiply_experts"  # planes, weight u8 [E * B], `Segments`; -> sums i32 [2P, N]
MAGIC = b"ENGRAMNP"
SIZE_BYTES = 8
MOST_HEADER_BYTES = 1 << 24  # of a name and a size for each layer: that of the demo model has some 5 KB


@dataclass(frozen=True, slots=True, eq=False)
class CommandsFile:
    """What a library asks of an accelerator.

    Attributes:
        geometry: of the accelerator.
        streams: command streams, each of one product.
        layers: names of the weights that products are with.
    """

    geometry: Geometry
    streams: Sequence[bytes]
    layers: Sequence[str]

    def to_bytes(self) -> bytes:
        """Return what `read_commands` reads."""
        header: Mapping[str, Any] = {
            "accelerator": self.geometry.accelerator,
            "npu": asdict(self.geometry),
            "stream_bytes": [len(stream) for stream in self.streams],
            "layers": list(self.layers),
        }
        text = json.dumps(header).encode()
        return b"".join([MAGIC, len(text).to_bytes(SIZE_BYTES, "little"), text, *self.streams])


def read_commands(path: Path) -> CommandsFile:
    """Read a library's command streams, which the device checks one by one.

    Raises:
        TargetError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise TargetError(f"{path} is missing, without which the accelerator has nothing to run; {AGAIN}")
    data = path.read_bytes()
    begin = len(MAGIC) + SIZE_BYTES
    end = begin + int.from_bytes(data[len(MAGIC) : begin], "little")
    if not data.startswith(MAGIC) or not begin < end <= min(len(data), begin + MOST_HEADER_BYTES):
        raise TargetError(f"{path} of {len(data)} bytes holds no command streams; {AGAIN}")
    try:
        return _parsed(path, data[begin:end], data[end:])
    except BundleError as error:
        raise TargetError(f"{error}; {AGAIN}") from error


def _parsed(path: Path, header: bytes, streams: bytes) -> CommandsFile:
    fields = Fields(parse_json_object(header, str(path)), str(path))
    geometry = parse_geometry(fields.take("accelerator", str), fields.value("npu"), str(path))
    sizes, layers = fields.integers("stream_bytes"), fields.texts("layers")
    fields.finish()
    if min(sizes, default=0) < 0 or sum(sizes) != len(streams):
        raise TargetError(f"{path} has {len(streams)} bytes of command streams, its header says {sum(sizes)}; {AGAIN}")
    ends = itertools.accumulate(sizes)
    return CommandsFile(geometry, [streams[end - size : end] for end, size in zip(ends, sizes, strict=True)], layers)
