/* Token ids to row ids of a table. */
#ifndef ENGRAM_HASH_H
#define ENGRAM_HASH_H

#include "manifest.h"

#define ENGRAM_NO_ROW (-1)   /* in place of a row id where a token reads none and gets zeros */
#define ENGRAM_NO_TOKEN (-1) /* in place of a token id before the text begins */

/* Fill row_ids [count, columns of the table].
 *
 * `ids` has the `count` tokens, and before them in memory as many earlier ones as the longest n-gram looks back, or
 * ENGRAM_NO_TOKEN. `token_map` has vocab_size ids in place of raw ones, or is NULL. */
void engram_row_ids(const engram_table *table, const int32_t *token_map, const int32_t *ids, size_t count,
                    int64_t *row_ids);

#endif
