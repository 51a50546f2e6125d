/* Files of the packed folder and memory from the system: the one part to change for a system without POSIX files. */
#ifndef ENGRAM_FILES_H
#define ENGRAM_FILES_H

#include "manifest.h"

#define ENGRAM_NO_FILE (-1)

typedef struct engram_file {
    const engram_file_facts *facts;
    int descriptor;            /* ENGRAM_NO_FILE where it is closed */
    const unsigned char *data; /* all of it, or NULL where it is only read */
} engram_file;

/* Put a sentence into an error and return -1. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int engram_fail(engram_error *error, const char *format, ...);

/* Open a file whose size and identity are those that were packed. Returns 0, or -1 with nothing open. */
int engram_file_open(engram_file *file, const char *folder, const engram_file_facts *facts, engram_error *error);

/* Have its contents in memory, mapped where the system can. Returns 0, or -1. */
int engram_file_load(engram_file *file, engram_error *error);

/* Copy bytes from a place in it. Returns 0, or -1. */
int engram_file_read(const engram_file *file, uint64_t offset, size_t count, unsigned char *out, engram_error *error);

/* Have no more read from the disk than is asked for. */
void engram_file_expect_random_reads(const engram_file *file);

/* Ask the disk for bytes that are about to be read. */
void engram_file_announce(const engram_file *file, uint64_t offset, size_t count);

/* Compare all of it with what was packed. Returns 0, or -1. */
int engram_file_verify(const engram_file *file, engram_error *error);

/* Release a file; one that isn't open is left alone. */
void engram_file_close(engram_file *file);

/* Zeroed memory whose pages are taken as they are written, 64-byte aligned; NULL where there is none. */
unsigned char *engram_reserve(size_t bytes);

/* Make all of it zeros again, its pages given back. Returns 0, or -1. */
int engram_renew(unsigned char *memory, size_t bytes);

/* Release it; NULL is allowed. */
void engram_release(unsigned char *memory, size_t bytes);

#endif
