"""Spares tests what compilers do again for every function or graph though it changes nothing they make.

TVM's parser asks `inspect` for all frames above a kernel, each with its line of source, and uses the frames alone;
under pytest there are a hundred. torch's exporter parses its operators' sources for every graph, and graphs of one
structure are traced for every format, place and option of an export.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType, SimpleNamespace

from torch import nn
from torch._subclasses import FakeTensorMode
from torch.onnx._internal import _lazy_import
from tvm.script.parser.core import parser
from tvm.tirx.script.parser import entry

from engram_export import graph_writer
from engram_export.decoder import Decoder
from engram_export.onnx_graph import TracedGraph, trace


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


def remember_traces() -> None:
    """Trace each structure of a module once a process; exports of it get copies of the graph."""
    known: dict[str, TracedGraph] = {}

    def traced(build: Callable[[], Decoder], embedding_width: int = 0) -> TracedGraph:
        with FakeTensorMode():
            module = build()
        key = f"{embedding_width} {structure(module)}"
        if "..." in key or " at 0x" in key:  # doesn't tell one from another
            return trace(build, embedding_width)
        if key not in known:
            known[key] = trace(build, embedding_width)
        return replace(known[key], model=known[key].model.clone(), skeleton=module)

    vars(graph_writer)["trace"] = traced


def structure(module: nn.Module) -> str:
    """Return what tells graphs apart here: modules' types, their values, and shapes of parameters and buffers."""
    own = vars(nn.Module())
    parts = []
    for name, part in module.named_modules():
        values = {key: value for key, value in vars(part).items() if key not in own}
        tensors = [(key, tuple(each.shape), each.dtype) for key, each in part.named_parameters(recurse=False)]
        tensors += [(key, tuple(each.shape), each.dtype) for key, each in part.named_buffers(recurse=False)]
        parts.append((name, type(part).__module__, type(part).__qualname__, values, tensors))
    return repr(parts)
