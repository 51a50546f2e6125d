#include "platform.h"

#include "engram.h"

#include "files.h"
#include "hash.h"
#include "model.h"
#include "tables.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if ENGRAM_WEIGHTS_BYTES > SIZE_MAX / 2 || ENGRAM_STATE_BYTES > SIZE_MAX / 2 || ENGRAM_SCRATCH_BYTES > SIZE_MAX / 2
#error "the weights or the states need 64-bit addresses; pack a smaller model, or export it with a smaller --context"
#endif

#define MOST_CONTEXT (ENGRAM_MOST_ORDER - 1) /* earlier tokens that a row id depends on */
#define ALIGNMENT_BYTES 64u
#define SITES (ENGRAM_SITES + 1) /* C has no arrays of nothing */
#define WEIGHTS 0                /* place of the weights among the files */

struct engram {
    engram_file *files; /* [engram_packed.num_files] */
    unsigned char *states;
    unsigned char *buffers; /* all that follows, engram_reserve'd */
    size_t buffer_bytes;
    unsigned char *scratch;
    float *logits;
    float *rows[SITES];
    float *embeddings;
    int64_t *row_ids[SITES]; /* of the pass that runs */
    int64_t *token_ids; /* of the pass, as the next two */
    int64_t *position;
    int64_t *logit_row;
    int32_t *recent; /* [MOST_CONTEXT + tokens]: what n-grams look back to, then the tokens of the pass */
    unsigned char *record;
    size_t length;
    int broken; /* whether a pass ended before its states were whole */
    size_t tokens;       /* of the pass that runs */
    engram_error *error; /* of the call that runs */
};

static size_t most_tokens(void) { return (size_t)engram_forwards[ENGRAM_FORWARDS - 1].tokens; }

static const int32_t *token_map_of(const engram *self, const engram_table *table)
{
    return table->keyer.has_token_map ? (const int32_t *)(const void *)self->files[table->keyer.token_map].data : NULL;
}

/* Give a buffer its place after all others; without memory the places only count. */
static void *take(unsigned char *memory, size_t *used, size_t bytes)
{
    unsigned char *place = memory == NULL ? NULL : memory + *used;
    *used += (bytes + ALIGNMENT_BYTES - 1) / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
    return place;
}

/* Lay out the buffers of a pass and return how many bytes they take. */
static size_t lay_out(engram *self, unsigned char *memory)
{
    size_t used = 0, tokens = most_tokens(), record_bytes = 0;
    self->scratch = take(memory, &used, (size_t)ENGRAM_SCRATCH_BYTES);
    self->logits = take(memory, &used, (size_t)engram_packed.model.vocab_size * sizeof(float));
    self->embeddings = take(memory, &used, tokens * engram_packed.embedding_width * sizeof(float));
    self->token_ids = take(memory, &used, tokens * sizeof(int64_t));
    self->position = take(memory, &used, sizeof(int64_t));
    self->logit_row = take(memory, &used, sizeof(int64_t));
    self->recent = take(memory, &used, (MOST_CONTEXT + tokens) * sizeof(int32_t));
    for (size_t site = 0; site < engram_packed.num_tables; site++) {
        const engram_table *table = engram_packed.tables + site;
        size_t rows = tokens * table->columns;
        self->rows[site] = take(memory, &used, rows * table->record.columns * sizeof(float));
        self->row_ids[site] = take(memory, &used, rows * sizeof(int64_t));
        record_bytes = table->record.record_bytes > record_bytes ? table->record.record_bytes : record_bytes;
    }
    self->record = take(memory, &used, record_bytes);
    return used;
}

static int open_files(engram_file *files, const char *folder, engram_error *error)
{
    for (size_t i = 0; i < engram_packed.num_files; i++)
        if (engram_file_open(files + i, folder, engram_packed.files + i, error))
            return -1;
    return 0;
}

static int load_tables(engram *self, engram_error *error)
{
    for (size_t i = 0; i < engram_packed.num_tables; i++) {
        const engram_keyer *keyer = &engram_packed.tables[i].keyer;
        if (keyer->has_token_map && engram_file_load(self->files + keyer->token_map, error))
            return -1;
    }
    for (size_t i = 1; i < engram_packed.num_files; i++) {
        engram_file *file = self->files + i;
        if (file->data == NULL && ENGRAM_MAP_TABLES && engram_file_load(file, error))
            return -1;
        engram_file_expect_random_reads(file);
    }
    return 0;
}

static int begin_text(engram *self)
{
    for (size_t i = 0; i < MOST_CONTEXT; i++)
        self->recent[i] = ENGRAM_NO_TOKEN;
    self->length = 0;
    self->broken = 0;
    return 0;
}

static int open_all(engram *self, const char *folder, engram_error *error)
{
    if (open_files(self->files, folder, error) || engram_file_load(self->files + WEIGHTS, error) ||
        load_tables(self, error))
        return -1;
    engram_file_announce(self->files + WEIGHTS, 0, (size_t)ENGRAM_WEIGHTS_BYTES);
    self->buffer_bytes = lay_out(self, NULL);
    self->buffers = engram_reserve(self->buffer_bytes);
    self->states = engram_reserve((size_t)ENGRAM_STATE_BYTES);
    if (self->buffers == NULL || self->states == NULL)
        return engram_fail(error, "there is no memory for %zu bytes of buffers and %zu of states", self->buffer_bytes,
                           (size_t)ENGRAM_STATE_BYTES);
    lay_out(self, self->buffers);
    return begin_text(self);
}

static engram_file *no_files(void)
{
    engram_file *files = calloc(engram_packed.num_files, sizeof *files);
    for (size_t i = 0; files != NULL && i < engram_packed.num_files; i++)
        files[i].descriptor = ENGRAM_NO_FILE;
    return files;
}

engram *engram_open(const char *folder, engram_error *error)
{
    engram *self = calloc(1, sizeof *self);
    if (self != NULL)
        self->files = no_files();
    if (self == NULL || self->files == NULL)
        engram_fail(error, "there is no memory to open %.100s", folder);
    else if (open_all(self, folder, error) == 0)
        return self;
    engram_close(self);
    return NULL;
}

int engram_reset(engram *self, engram_error *error)
{
    if (engram_renew(self->states, (size_t)ENGRAM_STATE_BYTES)) {
        self->broken = 1;
        return engram_fail(error, "there is no memory for %zu bytes of states", (size_t)ENGRAM_STATE_BYTES);
    }
    return begin_text(self);
}

/* Called by the generated code when it comes to a site. */
static int await_rows(void *context, int site)
{
    engram *self = context;
    const engram_table *table = engram_packed.tables + site;
    return engram_table_gather(table, self->files, self->row_ids[site], self->tokens * table->columns, self->record,
                               self->rows[site], self->error);
}

/* Hash the tokens of a pass and ask for their rows, which come while the layers before the sites are computed. */
static void announce_rows(engram *self)
{
    for (size_t site = 0; site < engram_packed.num_tables; site++) {
        const engram_table *table = engram_packed.tables + site;
        engram_row_ids(table, token_map_of(self, table), self->recent + MOST_CONTEXT, self->tokens,
                       self->row_ids[site]);
        engram_table_announce(table, self->files, self->row_ids[site], self->tokens * table->columns);
    }
}

/* Run one compiled pass over the next tokens, leaving the logits after the last of them. */
static int run_pass(engram *self, const engram_forward *forward, const int32_t *token_ids)
{
    engram_pass pass = {.weights = self->files[WEIGHTS].data,
                        .states = self->states,
                        .scratch = self->scratch,
                        .token_ids = self->token_ids,
                        .position = self->position,
                        .logit_rows = self->logit_row,
                        .embeddings = engram_packed.embedding_width ? self->embeddings : NULL,
                        .logits = self->logits,
                        .await_rows = await_rows,
                        .context = self};
    self->tokens = (size_t)forward->tokens;
    *self->position = (int64_t)self->length;
    *self->logit_row = forward->tokens - 1;
    for (size_t i = 0; i < self->tokens; i++)
        self->token_ids[i] = self->recent[MOST_CONTEXT + i] = token_ids[i];
    for (size_t site = 0; site < engram_packed.num_tables; site++)
        pass.rows[site] = self->rows[site];
    announce_rows(self);
    self->broken = 1;
    if (forward->run(&pass))
        return -1;
    self->broken = 0;
    memmove(self->recent, self->recent + self->tokens, MOST_CONTEXT * sizeof *self->recent);
    self->length += self->tokens;
    return 0;
}

static int check_tokens(const engram *self, const int32_t *token_ids, size_t count, engram_error *error)
{
    size_t room = engram_packed.model.context_length - self->length;
    if (self->broken)
        return engram_fail(error, "the text was ended by an error; begin another one with engram_reset");
    if (count == 0)
        return engram_fail(error, "no token is given, expected at least one");
    if (count > room)
        return engram_fail(error, "the context of %zu has room for %zu more tokens, not for %zu; begin another text",
                           engram_packed.model.context_length, room, count);
    for (size_t i = 0; i < count; i++)
        if (token_ids[i] < 0 || token_ids[i] >= engram_packed.model.vocab_size)
            return engram_fail(error, "token id %ld is outside the vocabulary, expected 0 to %ld", (long)token_ids[i],
                               (long)engram_packed.model.vocab_size - 1);
    return 0;
}

/* The largest compiled pass that `count` tokens fill. */
static const engram_forward *pass_for(size_t count)
{
    const engram_forward *found = engram_forwards;
    for (size_t i = 1; i < ENGRAM_FORWARDS; i++)
        if ((size_t)engram_forwards[i].tokens <= count)
            found = engram_forwards + i;
    return found;
}

const float *engram_step(engram *self, const int32_t *token_ids, size_t count, engram_error *error)
{
    if (check_tokens(self, token_ids, count, error))
        return NULL;
    self->error = error;
    while (count > 0) {
        const engram_forward *forward = pass_for(count);
        if (run_pass(self, forward, token_ids))
            return NULL;
        token_ids += forward->tokens;
        count -= (size_t)forward->tokens;
    }
    return self->logits;
}

int32_t engram_greedy(const float *logits, engram_error *error)
{
    int32_t best = 0;
    for (int32_t id = 0; id < engram_packed.model.vocab_size; id++) {
        if (!isfinite(logits[id]))
            return engram_fail(error, "the logit of token id %ld is not finite; check the bundle that was packed",
                               (long)id);
        if (logits[id] > logits[best])
            best = id;
    }
    return best;
}

int engram_ends(int32_t token_id)
{
    for (size_t i = 0; i < engram_packed.model.num_end_ids; i++)
        if (engram_packed.model.end_ids[i] == token_id)
            return 1;
    return 0;
}

size_t engram_length(const engram *self) { return self->length; }

void engram_close(engram *self)
{
    if (self == NULL)
        return;
    for (size_t i = 0; self->files != NULL && i < engram_packed.num_files; i++)
        engram_file_close(self->files + i);
    engram_release(self->buffers, self->buffer_bytes);
    engram_release(self->states, (size_t)ENGRAM_STATE_BYTES);
    free(self->files);
    free(self);
}

int engram_verify(const char *folder, engram_error *error)
{
    for (size_t i = 0; i < engram_packed.num_files; i++) {
        engram_file file;
        if (engram_file_open(&file, folder, engram_packed.files + i, error))
            return -1;
        int failed = engram_file_verify(&file, error);
        engram_file_close(&file);
        if (failed)
            return -1;
    }
    return 0;
}

const engram_model *engram_about(void) { return &engram_packed.model; }
