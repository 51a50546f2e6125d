"""Spares tests what TVM's script parser does for nothing: half the time of making a kernel.

Before it parses a function, the parser asks `inspect` for every frame above it, each with its line of source. It uses
the frames alone, and under pytest there are a hundred.
"""

import inspect
import sys
from types import FrameType, SimpleNamespace

from tvm.script.parser.core import parser
from tvm.tirx.script.parser import entry


def bare_stack(context: int = 0) -> list[inspect.FrameInfo]:
    """Return the frames above the caller's, its own first, as `inspect.stack` does, without lines of source."""
    return bare_frames(sys._getframe(1))


def bare_frames(frame: FrameType | None, context: int = 0) -> list[inspect.FrameInfo]:
    """Return a frame and all above it, as `inspect.getouterframes` does, without lines of source."""
    frames = []
    while frame is not None:
        code = frame.f_code
        frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
        frame = frame.f_back
    return frames


def spare_sources() -> None:
    """Give the parser frames without their lines."""
    bare = SimpleNamespace(**vars(inspect) | {"stack": bare_stack, "getouterframes": bare_frames})
    for module in (entry, parser):
        vars(module)["inspect"] = bare
