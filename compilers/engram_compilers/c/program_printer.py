"""Straight-line programs as C functions that call kernels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engram_compilers.c.kernel_printer import PrintedKernel
from engram_compilers.c.lines import Lines
from engram_compilers.program import (
    AwaitRows,
    Constant,
    Input,
    KernelCall,
    Output,
    Program,
    Scratch,
    State,
    Tensor,
    Weight,
)
from engram_runtime.library import PackedTensor
from engram_runtime.manifest import ROWS

_NO_NAME = re.compile(r"[^\w./-]", re.ASCII)  # names are a bundle's: none may end the comment it stands in


def rounded_up(size: int) -> int:
    """Return a size that keeps what follows aligned."""
    return -(-size // 64) * 64


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Where tensors are that programs share.

    Attributes:
        states: offsets of the states in their block, by name.
        sites: names of the inputs for rows of tables, in manifest order.
    """

    weights: Sequence[PackedTensor]
    states: Mapping[str, int]
    sites: Sequence[str]


@dataclass(frozen=True, slots=True)
class PrintedProgram:
    """A C function that runs a program, and the scratch memory it needs: the program's, then outputs, then kernels'."""

    text: str
    scratch_bytes: int


def print_program(program: Program, kernels: Mapping[str, PrintedKernel], layout: ModelLayout) -> PrintedProgram:
    """Return a program as a static function of an ``engram_pass``; its first output goes to the pass's logits."""
    outputs, end = _output_offsets(program)
    workspace = max((kernels[call.kernel].workspace_bytes for call in _kernel_calls(program)), default=0)
    lines = Lines()
    lines.add("const unsigned char *const weights = pass->weights;", defines="weights")
    lines.add("unsigned char *const states = pass->states;", defines="states")
    lines.add("unsigned char *const scratch = pass->scratch;", defines="scratch")
    for call in program.calls:
        if isinstance(call, AwaitRows):
            with lines.block(""):
                lines.add(f"const int failed = pass->await_rows(pass->context, {call.site});")
                lines.add("if (failed) return failed;")
            continue
        kernel = kernels[call.kernel]
        pairs = zip(call.arguments, kernel.parameters, strict=True)
        arguments = [_argument(tensor, kind, outputs, layout) for tensor, kind in pairs]
        arguments += [f"scratch + {end}"] if kernel.workspace_bytes else []
        lines.add(f"{kernel.name}({', '.join(arguments)});{_comment(call, layout)}")
    lines.add("return 0;")
    text = f"static int {program.name}(const engram_pass *pass) {{\n{lines.text}\n}}\n"
    return PrintedProgram(text, end + workspace)


def _kernel_calls(program: Program) -> list[KernelCall]:
    return [call for call in program.calls if isinstance(call, KernelCall)]


def _output_offsets(program: Program) -> tuple[dict[int, int], int]:
    """Return where in the scratch memory each output but the first lies, and where they end."""
    offsets: dict[int, int] = {}
    end = program.scratch_bytes
    for tensor in program.outputs:
        if isinstance(tensor.place, Output) and tensor.place.index not in (0, *offsets):
            offsets[tensor.place.index] = end
            end += rounded_up(tensor.bytes)
    return offsets, end


def _argument(tensor: Tensor, kind: str, outputs: Mapping[int, int], layout: ModelLayout) -> str:
    """Return a pointer to a tensor of the type that a kernel takes."""
    match tensor.place:
        case Input(name) if name.startswith(ROWS):
            return f"pass->rows[{layout.sites.index(name)}]"
        case Input(name):
            return f"pass->{name}"
        case Constant(index):
            return f"constant_{index}"
        case Output(0):
            return "pass->logits"
        case Output(index):
            return f"({kind})(scratch + {outputs[index]})"
        case Scratch(offset):
            return f"({kind})(scratch + {offset})"
        case State(name):
            return f"({kind})(states + {layout.states[name]})"
        case Weight(index):
            return f"({kind})(weights + {layout.weights[index].offset})"


def _comment(call: KernelCall, layout: ModelLayout) -> str:
    """Return which weights a call is about."""
    names = [layout.weights[each.place.index].name for each in call.arguments if isinstance(each.place, Weight)]
    layers = dict.fromkeys(_NO_NAME.sub("_", name.partition(":")[0]) for name in names)
    return f"  /* {', '.join(layers)} */" if layers else ""
