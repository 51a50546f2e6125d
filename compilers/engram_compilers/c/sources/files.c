#include "platform.h"

#include "files.h"

#include "sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifndef ENGRAM_NO_MMAP
#include <sys/mman.h>
#endif

#define BLOCK_BYTES 4096u
#define IDENTITY_BYTES (64u << 10)
#define ALIGNMENT_BYTES 64u

int engram_fail(engram_error *error, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(error->text, sizeof error->text, format, values);
    va_end(values);
    return -1;
}

/* Hash the first bytes of a file into a digest that has begun. */
static int hash_file(const engram_file *file, uint64_t count, engram_sha256 *digest, engram_error *error)
{
    unsigned char block[BLOCK_BYTES];
    for (uint64_t offset = 0; offset < count; offset += BLOCK_BYTES) {
        size_t size = count - offset < BLOCK_BYTES ? (size_t)(count - offset) : BLOCK_BYTES;
        if (engram_file_read(file, offset, size, block, error))
            return -1;
        engram_sha256_add(digest, block, size);
    }
    return 0;
}

static int check_identity(const engram_file *file, engram_error *error)
{
    unsigned char size[8], found[32];
    uint64_t bytes = file->facts->bytes;
    engram_sha256 digest;
    for (int i = 0; i < 8; i++)
        size[i] = (unsigned char)(bytes >> 8 * i);
    engram_sha256_begin(&digest);
    engram_sha256_add(&digest, size, sizeof size);
    if (hash_file(file, bytes < IDENTITY_BYTES ? bytes : IDENTITY_BYTES, &digest, error))
        return -1;
    engram_sha256_end(&digest, found);
    if (memcmp(found, file->facts->identity, sizeof found))
        return engram_fail(error, "%s is not the file that was packed with this program; copy it again",
                           file->facts->path);
    return 0;
}

static int check_size(const engram_file *file, engram_error *error)
{
    struct stat status;
    const engram_file_facts *facts = file->facts;
    if (fstat(file->descriptor, &status))
        return engram_fail(error, "%s can't be read: %s", facts->path, strerror(errno));
    if (!S_ISREG(status.st_mode))
        return engram_fail(error, "%s is not a plain file; copy it again", facts->path);
    if ((uint64_t)status.st_size != facts->bytes)
        return engram_fail(error, "%s holds %llu bytes, %llu were packed; copy it again", facts->path,
                           (unsigned long long)status.st_size, (unsigned long long)facts->bytes);
    return 0;
}

int engram_file_open(engram_file *file, const char *folder, const engram_file_facts *facts, engram_error *error)
{
    size_t size = strlen(folder) + strlen(facts->path) + 2;
    char *path = malloc(size);
    file->facts = facts;
    file->data = NULL;
    file->descriptor = ENGRAM_NO_FILE;
    if (path == NULL)
        return engram_fail(error, "there is no memory for a path of %zu bytes", size);
    snprintf(path, size, "%s/%s", folder, facts->path);
    file->descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe would wait for a writer */
    free(path);
    if (file->descriptor < 0)
        return engram_fail(error, "%s can't be opened in %.100s: %s", facts->path, folder, strerror(errno));
    if (check_size(file, error) || check_identity(file, error)) {
        engram_file_close(file);
        return -1;
    }
    return 0;
}

int engram_file_read(const engram_file *file, uint64_t offset, size_t count, unsigned char *out, engram_error *error)
{
    while (count > 0) {
        ssize_t found = pread(file->descriptor, out, count, (off_t)offset);
        if (found < 0 && errno == EINTR)
            continue;
        if (found < 0)
            return engram_fail(error, "%s can't be read at %llu: %s", file->facts->path, (unsigned long long)offset,
                               strerror(errno));
        if (found == 0)
            return engram_fail(error, "%s ends before byte %llu: it was truncated", file->facts->path,
                               (unsigned long long)(offset + count));
        out += found;
        offset += (uint64_t)found;
        count -= (size_t)found;
    }
    return 0;
}

int engram_file_verify(const engram_file *file, engram_error *error)
{
    unsigned char found[32];
    engram_sha256 digest;
    engram_sha256_begin(&digest);
    if (hash_file(file, file->facts->bytes, &digest, error))
        return -1;
    engram_sha256_end(&digest, found);
    if (memcmp(found, file->facts->sha256, sizeof found))
        return engram_fail(error, "%s is damaged: its SHA-256 is another one than when it was packed; copy it again",
                           file->facts->path);
    return 0;
}

void engram_file_expect_random_reads(const engram_file *file)
{
#ifndef ENGRAM_NO_MMAP
    if (file->data != NULL)
        posix_madvise((void *)(uintptr_t)file->data, (size_t)file->facts->bytes, POSIX_MADV_RANDOM);
#endif
#ifdef POSIX_FADV_RANDOM
    posix_fadvise(file->descriptor, 0, 0, POSIX_FADV_RANDOM);
#else
    (void)file;
#endif
}

void engram_file_announce(const engram_file *file, uint64_t offset, size_t count)
{
#ifndef ENGRAM_NO_MMAP
    if (file->data != NULL) {
        size_t ahead = (size_t)(offset % (uint64_t)sysconf(_SC_PAGESIZE));
        posix_madvise((void *)(uintptr_t)(file->data + offset - ahead), count + ahead, POSIX_MADV_WILLNEED);
        return;
    }
#endif
#ifdef POSIX_FADV_WILLNEED
    posix_fadvise(file->descriptor, (off_t)offset, (off_t)count, POSIX_FADV_WILLNEED);
#else
    (void)file, (void)offset, (void)count;
#endif
}

#ifndef ENGRAM_NO_MMAP

int engram_file_load(engram_file *file, engram_error *error)
{
    void *mapped = MAP_FAILED;
    if (file->facts->bytes <= SIZE_MAX)
        mapped = mmap(NULL, (size_t)file->facts->bytes, PROT_READ, MAP_PRIVATE, file->descriptor, 0);
    if (mapped == MAP_FAILED)
        return engram_fail(error, "%s can't be mapped, it has %llu bytes: %s", file->facts->path,
                           (unsigned long long)file->facts->bytes, strerror(errno));
    file->data = mapped;
    return 0;
}

static void unload(engram_file *file)
{
    if (file->data != NULL)
        munmap((void *)(uintptr_t)file->data, (size_t)file->facts->bytes);
}

static unsigned char *map_zeros(unsigned char *place, size_t bytes)
{
    int flags = place == NULL ? 0 : MAP_FIXED;
#ifdef MAP_NORESERVE
    flags |= MAP_NORESERVE; /* a context that is never filled needs no memory, nor the promise of it */
#endif
    void *memory = mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (memory == MAP_FAILED)
        return NULL;
#ifdef MADV_NOHUGEPAGE
    madvise(memory, bytes, MADV_NOHUGEPAGE); /* else the first position of each head would take 2 MiB */
#endif
    return memory;
}

unsigned char *engram_reserve(size_t bytes) { return map_zeros(NULL, bytes); }

int engram_renew(unsigned char *memory, size_t bytes) { return map_zeros(memory, bytes) == NULL ? -1 : 0; }

void engram_release(unsigned char *memory, size_t bytes)
{
    if (memory != NULL)
        munmap(memory, bytes);
}

#else

static unsigned char *allocate(uint64_t bytes)
{
    uint64_t rounded = (bytes + ALIGNMENT_BYTES - 1) / ALIGNMENT_BYTES * ALIGNMENT_BYTES;
    return rounded <= SIZE_MAX ? aligned_alloc(ALIGNMENT_BYTES, (size_t)rounded) : NULL;
}

int engram_file_load(engram_file *file, engram_error *error)
{
    unsigned char *data = allocate(file->facts->bytes);
    if (data == NULL)
        return engram_fail(error, "there is no memory for the %llu bytes of %s",
                           (unsigned long long)file->facts->bytes, file->facts->path);
    file->data = data;
    return engram_file_read(file, 0, (size_t)file->facts->bytes, data, error);
}

static void unload(engram_file *file) { free((void *)(uintptr_t)file->data); }

unsigned char *engram_reserve(size_t bytes)
{
    unsigned char *memory = allocate(bytes);
    if (memory != NULL)
        memset(memory, 0, bytes);
    return memory;
}

int engram_renew(unsigned char *memory, size_t bytes)
{
    memset(memory, 0, bytes);
    return 0;
}

void engram_release(unsigned char *memory, size_t bytes)
{
    (void)bytes;
    free(memory);
}

#endif

void engram_file_close(engram_file *file)
{
    unload(file);
    file->data = NULL;
    if (file->descriptor != ENGRAM_NO_FILE)
        close(file->descriptor);
    file->descriptor = ENGRAM_NO_FILE;
}
