"""A model for the C runtime that computes nothing: its logits are the table rows it was given."""

from pathlib import Path

from engram_compilers.c.constants import PackedFile, PackedModel, file_key, manifest_source
from engram_runtime.bundle import file_identity, file_sha256
from engram_runtime.manifest import ModelInfo
from engram_runtime.table_spec import TableSpec

CONTEXT, PASSES, END_IDS = 64, (1, 4), (3, 250)
TOLD = 3  # last logits: the pass's first position, how many tokens the states have seen, how many the pass has
WEIGHTS = bytes(range(64))

MODEL_H = """\
#ifndef ENGRAM_MODEL_H
#define ENGRAM_MODEL_H
#include <stdint.h>
#define ENGRAM_WEIGHTS_BYTES UINT64_C({weights})
#define ENGRAM_STATE_BYTES UINT64_C({states})
#define ENGRAM_SCRATCH_BYTES UINT64_C(64)
#define ENGRAM_SITES {sites}
#define ENGRAM_FORWARDS {forwards}
typedef struct engram_pass {{
    const unsigned char *weights;
    unsigned char *states;
    unsigned char *scratch;
    const int64_t *token_ids;
    const int64_t *position;
    const int64_t *logit_rows;
    float *rows[ENGRAM_SITES + 1];
    const float *embeddings;
    float *logits;
    int (*await_rows)(void *context, int site);
    void *context;
}} engram_pass;
typedef struct engram_forward {{
    int tokens;
    int rows;
    int (*run)(const engram_pass *pass);
}} engram_forward;
extern const engram_forward engram_forwards[ENGRAM_FORWARDS];
#endif
"""

MODEL_C = """\
#include "platform.h"
#include "model.h"
#include <string.h>
static const int sizes[] = {{{sizes}}}; /* and 0, as C has no empty arrays */
static int forward(const engram_pass *pass, int tokens)
{{
    float *logits = pass->logits;
    for (int site = 0; site < ENGRAM_SITES; site++) {{
        if (pass->await_rows(pass->context, site))
            return -1;
        memcpy(logits, pass->rows[site] + (tokens - 1) * sizes[site], (size_t)sizes[site] * sizeof *logits);
        logits += sizes[site];
    }}
    pass->states[0] = (unsigned char)(pass->states[0] + tokens);
    logits[0] = (float)*pass->position;
    logits[1] = pass->states[0];
    logits[2] = (float)(*pass->logit_rows + 1);
    return 0;
}}
{functions}
const engram_forward engram_forwards[ENGRAM_FORWARDS] = {{{entries}}};
"""


def row_values(table: TableSpec) -> int:
    """Return how many values a token gets of a table."""
    return table.keyer.columns * table.record.columns


def write_stub(
    folder: Path,
    tables: list[TableSpec],
    *,
    name: str = "stub",
    end_ids: tuple[int, ...] = END_IDS,
    state_bytes: int = 64,
) -> int:
    """Write the generated part of a program whose tables' files lie in ``folder``; returns the vocabulary's size.

    Its logits are the rows of the last token, of one table after another, and the `TOLD` values.
    """
    vocab_size = sum(row_values(table) for table in tables) + TOLD
    (folder / "weights.bin").write_bytes(WEIGHTS)
    keys = {file_key(rows): rows.file for table in tables for rows in table.ranges}
    keys |= {(file, None): file for table in tables for file in table.keyer.files}
    info = ModelInfo(
        name=name,
        family="stub",
        quantisation="none",
        vocab_size=vocab_size,
        hidden_size=1,
        num_layers=1,
        context_length=CONTEXT,
    )
    model = PackedModel(
        info=info,
        end_ids=end_ids,
        embedding_width=0,
        files=[_facts(folder, path) for path in ("weights.bin", *keys.values())],
        tables=tables,
        places={key: 1 + place for place, key in enumerate(keys)},
    )
    (folder / "manifest.c").write_text(manifest_source(model), encoding="ascii")
    _write_model(folder, tables, state_bytes)
    return vocab_size


def _facts(folder: Path, path: str) -> PackedFile:
    file = folder / path
    return PackedFile(path=path, bytes=file.stat().st_size, identity=file_identity(file), sha256=file_sha256(file))


def _write_model(folder: Path, tables: list[TableSpec], state_bytes: int) -> None:
    facts = {"weights": len(WEIGHTS), "states": state_bytes, "sites": len(tables), "forwards": len(PASSES)}
    (folder / "model.h").write_text(MODEL_H.format(**facts))
    functions = "\n".join(
        f"static int forward_{count}(const engram_pass *pass) {{ return forward(pass, {count}); }}" for count in PASSES
    )
    entries = ", ".join(f"{{{count}, 1, forward_{count}}}" for count in PASSES)
    sizes = ", ".join([*(str(row_values(table)) for table in tables), "0"])
    (folder / "model.c").write_text(MODEL_C.format(functions=functions, entries=entries, sizes=sizes))
