"""Spares tests what compilers do again for every function or graph though it changes nothing they make.

Both took a third of the time: TVM's parser asks `inspect` for all frames above a kernel, each with its line of source,
and uses the frames alone; under pytest there are a hundred. torch's exporter parses its operators' sources for every
graph.
"""

import functools
import inspect
import sys
from types import FrameType, SimpleNamespace

from torch.onnx._internal import _lazy_import
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


def spare_repetitions() -> None:
    """Give the parser frames without their lines, and the exporter the operators it parsed before."""
    bare = SimpleNamespace(**vars(inspect) | {"stack": bare_stack, "getouterframes": bare_frames})
    for module in (entry, parser):
        vars(module)["inspect"] = bare
    operators = vars(_lazy_import)["onnxscript_apis"]
    operators.get_torchlib_ops = functools.cache(operators.get_torchlib_ops)
