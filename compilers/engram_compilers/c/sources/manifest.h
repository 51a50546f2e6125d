/* What manifest.c, which is generated, says of the folder's files and tables. */
#ifndef ENGRAM_MANIFEST_H
#define ENGRAM_MANIFEST_H

#include "engram.h"

#define ENGRAM_MOST_ORDER 16 /* tokens of the longest n-gram that a keyer may have */

typedef struct engram_file_facts {
    const char *path; /* below the folder */
    uint64_t bytes;
    unsigned char identity[32]; /* SHA-256 of the size, 8 bytes, and the first 64 KiB */
    unsigned char sha256[32];   /* of the whole file */
} engram_file_facts;

/* Consecutive rows of a part: row i lies at offset + (i - first_row) * row_bytes of a file. */
typedef struct engram_range {
    uint64_t first_row;
    uint64_t offset;
    size_t file; /* place in engram_files */
} engram_range;

typedef struct engram_part {
    size_t row_bytes;
    size_t num_ranges;
    const engram_range *ranges; /* by first_row, complete */
} engram_part;

typedef enum engram_payload {
    ENGRAM_FLOAT32,
    ENGRAM_FLOAT16,
    ENGRAM_BFLOAT16,
    ENGRAM_FLOAT8_E4M3,
    ENGRAM_INT8,
    ENGRAM_INT4
} engram_payload;

typedef enum engram_scale {
    ENGRAM_SCALE_NONE,
    ENGRAM_SCALE_FLOAT16,
    ENGRAM_SCALE_FLOAT32,
    ENGRAM_SCALE_E8M0
} engram_scale;

/* A record is its columns, then one scale for each group of scale_columns; value = payload * scale * factor. */
typedef struct engram_record {
    engram_payload payload;
    engram_scale scale;
    size_t columns;
    size_t scale_columns;
    size_t payload_bytes;
    size_t record_bytes;
    float factor;
} engram_record;

/* How the last tokens become row ids. Without orders it is the token's own id, or pad_id from vocab_size on. */
typedef struct engram_keyer {
    size_t num_orders;
    const size_t *orders; /* ascending */
    size_t num_heads;
    const uint64_t *multipliers; /* [largest order] */
    const uint64_t *primes;      /* [num_orders * num_heads] */
    const uint64_t *offsets;     /* likewise */
    int32_t pad_id;
    int32_t vocab_size;
    size_t num_barrier_ids;
    const int32_t *barrier_ids; /* ascending, as the silent ones */
    size_t num_silent_ids;
    const int32_t *silent_ids;
    int has_token_map;
    size_t token_map; /* place in engram_files, where there is one */
} engram_keyer;

typedef struct engram_table {
    const char *site;
    uint64_t num_rows;
    size_t columns; /* rows that a token reads */
    engram_record record;
    size_t num_parts;
    const engram_part *parts;
    engram_keyer keyer;
} engram_table;

typedef struct engram_manifest {
    engram_model model;
    size_t embedding_width; /* of the decoder's input embeddings, 0 where it takes none */
    size_t num_files;
    const engram_file_facts *files; /* the weights first */
    size_t num_tables;
    const engram_table *tables; /* by site, in the order of the decoder's inputs */
} engram_manifest;

extern const engram_manifest engram_packed;

#endif
