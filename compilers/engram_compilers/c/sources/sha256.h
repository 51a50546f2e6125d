/* SHA-256 (FIPS 180-4). */
#ifndef ENGRAM_SHA256_H
#define ENGRAM_SHA256_H

#include <stddef.h>
#include <stdint.h>

typedef struct engram_sha256 {
    uint32_t state[8];
    uint64_t bytes;
    unsigned char block[64];
} engram_sha256;

void engram_sha256_begin(engram_sha256 *self);
void engram_sha256_add(engram_sha256 *self, const unsigned char *data, size_t count);
void engram_sha256_end(engram_sha256 *self, unsigned char digest[32]);

#endif
