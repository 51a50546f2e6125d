/* Rows of a table, fetched from its files. */
#ifndef ENGRAM_TABLES_H
#define ENGRAM_TABLES_H

#include "files.h"

/* Ask the disk for the records of `count` row ids that are about to be read. */
void engram_table_announce(const engram_table *table, const engram_file *files, const int64_t *row_ids, size_t count);

/* Fill out [count, columns of a record] with rows, zeros for ENGRAM_NO_ROW. Returns 0, or -1.
 * `record` has room for one record's bytes. */
int engram_table_gather(const engram_table *table, const engram_file *files, const int64_t *row_ids, size_t count,
                        unsigned char *record, float *out, engram_error *error);

#endif
