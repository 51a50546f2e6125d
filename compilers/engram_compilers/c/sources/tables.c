#include "platform.h"

#include "tables.h"

#include "hash.h"
#include "records.h"

#include <string.h>

/* Return the range of a part that has a row: the last one that begins at or before it. */
static const engram_range *range_of(const engram_part *part, uint64_t row)
{
    size_t low = 0, high = part->num_ranges;
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (part->ranges[middle].first_row <= row)
            low = middle;
        else
            high = middle;
    }
    return part->ranges + low;
}

static uint64_t offset_of(const engram_part *part, const engram_range *range, uint64_t row)
{
    return range->offset + (row - range->first_row) * part->row_bytes;
}

void engram_table_announce(const engram_table *table, const engram_file *files, const int64_t *row_ids, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (row_ids[i] == ENGRAM_NO_ROW)
            continue;
        for (size_t p = 0; p < table->num_parts; p++) {
            const engram_part *part = table->parts + p;
            const engram_range *range = range_of(part, (uint64_t)row_ids[i]);
            engram_file_announce(files + range->file, offset_of(part, range, (uint64_t)row_ids[i]), part->row_bytes);
        }
    }
}

/* Put the parts of a row's record one after another. */
static int read_record(const engram_table *table, const engram_file *files, uint64_t row, unsigned char *record,
                       engram_error *error)
{
    for (size_t p = 0; p < table->num_parts; p++) {
        const engram_part *part = table->parts + p;
        const engram_range *range = range_of(part, row);
        const engram_file *file = files + range->file;
        uint64_t offset = offset_of(part, range, row);
        if (file->data != NULL)
            memcpy(record, file->data + offset, part->row_bytes);
        else if (engram_file_read(file, offset, part->row_bytes, record, error))
            return -1;
        record += part->row_bytes;
    }
    return 0;
}

int engram_table_gather(const engram_table *table, const engram_file *files, const int64_t *row_ids, size_t count,
                        unsigned char *record, float *out, engram_error *error)
{
    for (size_t i = 0; i < count; i++, out += table->record.columns) {
        if (row_ids[i] == ENGRAM_NO_ROW) {
            memset(out, 0, table->record.columns * sizeof *out);
            continue;
        }
        if (read_record(table, files, (uint64_t)row_ids[i], record, error))
            return -1;
        engram_decode(&table->record, record, out);
    }
    return 0;
}
