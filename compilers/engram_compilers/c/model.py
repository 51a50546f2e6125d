"""A bundle's decoder as C: ``model.c``, ``model.h`` and the packed weights.

The code needs GCC from 12 or clang, and of the C library what ``math.h`` and ``string.h`` have. It must be compiled
without -ffast-math and with -ffp-contract=off: then its results are those of a library of portable kernels, bit for bit
but for exp, log and tanh of numbers that no kernel computes itself, which are the C library's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engram_compilers.c.c_types import CType
from engram_compilers.c.expressions import integer, number
from engram_compilers.c.kernel_printer import print_kernel
from engram_compilers.c.lowered_kernels import lowered_kernels
from engram_compilers.c.program_printer import ModelLayout, print_program, rounded_up
from engram_compilers.c.vector_helpers import Helpers
from engram_compilers.lowering import lower
from engram_compilers.onnx_model import read_onnx_model
from engram_compilers.packed_weights import PackedWeights
from engram_compilers.program import Programs
from engram_compilers.straight_line import programs
from engram_runtime.bundle import Bundle
from engram_runtime.errors import CompileError
from engram_runtime.executor import ALIGNMENT_BYTES, FLOAT32, state_bytes
from engram_runtime.library import pass_function
from engram_runtime.manifest import DECODER, ROWS, GraphSpec

SOURCE_FILE, HEADER_FILE, WEIGHTS_FILE = "model.c", "model.h", "weights.bin"
PORTABLE = "portable"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmittedModel:
    """What was written, and the memory a caller has to have."""

    weights_bytes: int
    state_bytes: int
    scratch_bytes: int
    source_bytes: int


def emit_model(
    bundle: Bundle, passes: Sequence[tuple[int, int]], folder: Path, *, cache_dtype: str = FLOAT32
) -> EmittedModel:
    """Write the decoder's forward passes as C sources and its weights as they read them.

    Args:
        passes: (tokens, rows of logits) of each.
        folder: where `SOURCE_FILE`, `HEADER_FILE` and `WEIGHTS_FILE` are not there yet.

    Raises:
        CompileError: the graph has no lowering, or a kernel C can't express.
    """
    if cache_dtype != FLOAT32:
        raise CompileError(
            f"cache_dtype is {cache_dtype}, C sources keep caches in {FLOAT32}; change it in the profile"
        )
    spec = bundle.manifest.decoder
    graph = read_onnx_model(bundle.file(spec.file), bundle.file(spec.weights))
    with PackedWeights(folder / WEIGHTS_FILE) as packed:
        lowered = lower({DECODER: (graph, spec)}, packed, family=PORTABLE, passes=passes)
        weights_bytes = packed.bytes
    taken = programs(lowered, {DECODER: spec})
    states, states_bytes = _state_offsets(spec)
    sites = [tensor.name for tensor in spec.inputs if tensor.name.startswith(ROWS)]
    layout = ModelLayout(weights=tuple(packed.tensors.values()), states=states, sites=sites)
    source, scratch_bytes = _source(taken, layout, sorted(passes))
    sizes = {"WEIGHTS_BYTES": weights_bytes, "STATE_BYTES": states_bytes, "SCRATCH_BYTES": scratch_bytes}
    header = _HEADER.format(
        sizes="".join(f"#define ENGRAM_{name} UINT64_C({size})\n" for name, size in sizes.items()),
        sites=len(sites),
        forwards=len(passes),
    )
    (folder / SOURCE_FILE).write_text(source, encoding="utf-8")
    (folder / HEADER_FILE).write_text(header, encoding="utf-8")
    return EmittedModel(
        weights_bytes=weights_bytes,
        state_bytes=states_bytes,
        scratch_bytes=scratch_bytes,
        source_bytes=len(source.encode()),
    )


def _state_offsets(spec: GraphSpec) -> tuple[dict[str, int], int]:
    """Return where each state lies in their block, and its size."""
    offsets, end = {}, 0
    for state in spec.states:
        offsets[state.name] = end
        end += rounded_up(state_bytes([state]))
    return offsets, end


def _source(taken: Programs, layout: ModelLayout, passes: Sequence[tuple[int, int]]) -> tuple[str, int]:
    """Return ``model.c`` and the most scratch memory a pass needs."""
    helpers = Helpers()
    lowered = lowered_kernels(taken.kernels)
    kernels = {name: print_kernel(name, kernel, helpers) for name, kernel in lowered.items()}
    forwards = [print_program(taken.of[pass_function(DECODER, *sizes)], kernels, layout) for sizes in passes]
    entries = [f"    {{{tokens}, {rows}, {pass_function(DECODER, tokens, rows)}}}," for tokens, rows in passes]
    parts = [
        _PROLOGUE,
        helpers.text,
        "",
        *(_constant(index, values) for index, values in enumerate(taken.constants)),
        *(kernel.text for kernel in kernels.values()),
        *(forward.text for forward in forwards),
        "const engram_forward engram_forwards[ENGRAM_FORWARDS] = {",
        *entries,
        "};",
    ]
    return "\n".join(parts) + "\n", max(forward.scratch_bytes for forward in forwards)


def _constant(index: int, values: NDArray[Any]) -> str:
    kind = CType.of(values.dtype.name)
    code = number if kind.letter == "f" else integer
    numbers = ", ".join(code(value, kind).text for value in values.ravel().tolist())
    aligned = f"__attribute__((aligned({ALIGNMENT_BYTES})))"
    return f"static const {kind.name} constant_{index}[{values.size}] {aligned} = {{{numbers}}};\n"


_PROLOGUE = """\
/* A model's forward passes, written by engram-edge: kernels first, then what calls them in order.
 *
 * Compile with GCC from 12 or clang, with -ffp-contract=off and without -ffast-math.
 */
#include "model.h"

#include <math.h>
#include <string.h>

#ifdef __FAST_MATH__
#error "compile without -ffast-math: results would not be those of the model"
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the packed weights are little-endian"
#endif
#pragma GCC diagnostic ignored "-Wpsabi" /* wide vectors only go between functions of this file */
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* some sums begin in the first turn of their loop */
#endif
#define INLINE static inline __attribute__((always_inline))
#define ONCE static __attribute__((noinline, const))
#ifdef __FP_FAST_FMAF
#define CALLED INLINE
#else /* each lane is a call of the C library */
#define CALLED ONCE
#endif
#if defined(__AVX512F__) || defined(__clang__)
#define LANEWISE INLINE
#else /* GCC does lane by lane what is longer than the machine's vectors */
#define LANEWISE ONCE
#endif
"""

_HEADER = """\
/* A model's forward passes, by engram-edge. No globals, no heap: memory is the caller's, aligned to 64 bytes. */
#ifndef ENGRAM_MODEL_H
#define ENGRAM_MODEL_H

#include <stdint.h>

{sizes}#define ENGRAM_SITES {sites}
#define ENGRAM_FORWARDS {forwards}

/* T tokens of a text, with logits after R of them. */
typedef struct engram_pass {{
  const unsigned char *weights;  /* weights.bin, ENGRAM_WEIGHTS_BYTES */
  unsigned char *states;         /* ENGRAM_STATE_BYTES: zeros where a text begins, changed by each pass */
  unsigned char *scratch;        /* ENGRAM_SCRATCH_BYTES, of no meaning between passes */
  const int64_t *token_ids;      /* [T], each below the size of the vocabulary */
  const int64_t *position;       /* [1], how many tokens of the text come before; T fewer than the context at most */
  const int64_t *logit_rows;     /* [R], which of the T tokens logits are wanted after */
  float *rows[ENGRAM_SITES + 1]; /* by site, [T, C, d], filled by await_rows */
  const float *embeddings;       /* [T, D] for a model that takes them, else NULL */
  float *logits;                 /* [R, V], written */
  /* Called once for each site before its rows are read; a result other than 0 ends the pass, which returns it. */
  int (*await_rows)(void *context, int site);
  void *context;
}} engram_pass;

typedef struct engram_forward {{
  int tokens, rows;                    /* T and R */
  int (*run)(const engram_pass *pass); /* returns 0, or what await_rows returned */
}} engram_forward;

extern const engram_forward engram_forwards[ENGRAM_FORWARDS]; /* ascending by tokens, then rows */

#endif
"""
