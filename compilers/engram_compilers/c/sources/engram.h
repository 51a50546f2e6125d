/* A language model with Engram tables as plain C: what an embedding program calls.
 *
 * An `engram` is a model with one text. There are no globals and no threads: any number of them may be open, each to
 * be used by one thread at a time; those of one folder share the memory that its files are mapped to.
 * Whatever can fail says why in an `engram_error`, which must not be NULL. The files of the folder must not change
 * while they are open. */
#ifndef ENGRAM_H
#define ENGRAM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct engram engram;

typedef struct engram_error {
    char text[320]; /* one sentence, ended by a zero byte */
} engram_error;

typedef struct engram_model {
    const char *name;
    int32_t vocab_size;      /* ids are 0 to vocab_size - 1 */
    size_t context_length;   /* tokens that a text may have */
    size_t num_end_ids;      /* may be 0 */
    const int32_t *end_ids;  /* the ids that end an answer */
    uint64_t weights_bytes;  /* mapped, shared with other processes */
    uint64_t state_bytes;    /* reserved for the text; pages take memory once their positions are used */
    uint64_t scratch_bytes;  /* allocated beside it */
} engram_model;

/* What this program was generated for; needs no open folder. */
const engram_model *engram_about(void);

/* Open the folder that holds weights.bin and tables/, with an empty text; NULL if that fails.
 * Sizes and the first 64 KiB of every file are checked: see engram_verify for all of it. */
engram *engram_open(const char *folder, engram_error *error);

/* Add `count` token ids to the text. Returns the logits of the token to come, [vocab_size] floats that are valid until
 * the next call, or NULL: no token, an id outside the vocabulary or a full context leave the text as it was; a table
 * that can't be read ends it, and only engram_reset goes on. */
const float *engram_step(engram *self, const int32_t *token_ids, size_t count, engram_error *error);

/* The id of the largest logit, of equal ones the lowest; -1 if a logit is not finite. */
int32_t engram_greedy(const float *logits, engram_error *error);

/* Whether an id ends an answer. */
int engram_ends(int32_t token_id);

/* How many tokens the text has. */
size_t engram_length(const engram *self);

/* Begin an empty text. Returns 0, or -1 if the system grants no memory. */
int engram_reset(engram *self, engram_error *error);

/* Release everything; NULL is allowed. */
void engram_close(engram *self);

/* Read every file of a folder and compare its SHA-256 with what was packed. Returns 0, or -1. */
int engram_verify(const char *folder, engram_error *error);

#ifdef __cplusplus
}
#endif

#endif
