/* Bytes of a table's record to float values. */
#ifndef ENGRAM_RECORDS_H
#define ENGRAM_RECORDS_H

#include "manifest.h"

/* Fill out [columns] from record_bytes bytes, which may lie anywhere. */
void engram_decode(const engram_record *record, const unsigned char *bytes, float *out);

#endif
