/* Preloaded before the C library: makes file calls fail on purpose, or notes what was written. See shim.py.
 *
 * A call is counted where its kind is armed and its path contains the armed text. The Nth one fails, or all from the
 * Nth on. Only descriptors that may write count for close, and a failing one closes; SHORT does half of a read or
 * write. What was noted is written to a descriptor of the shim's own: a line "kind result offset length path\tsecond
 * path", then as many bytes. */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, READ = 2, PREAD = 4, CREATE = 8, WRITE = 16, FSYNC = 32, CLOSE = 64, TRUNCATE = 128,
       RENAME = 256, MKDIR = 512, UNLINK = 1024, RMDIR = 2048, CHMOD = 4096, COPY = 8192 };
enum { SHORT = -1 };
#define CHANGES (CREATE | WRITE | FSYNC | TRUNCATE | RENAME | MKDIR | UNLINK | RMDIR | COPY)

static int armed_calls, armed_error, armed_sticky, log_descriptor = -1;
static long armed_nth;
static char armed_path[PATH_MAX], logged_path[PATH_MAX];
static atomic_long seen;
static pthread_mutex_t log_lock = PTHREAD_MUTEX_INITIALIZER;

/* Looked up before main: dlsym takes a lock, which a fork may find taken. */
#define NEXT(each) each(chmod) each(close) each(copy_file_range) each(fchmod) each(fchmodat) each(fdatasync) each(fsync) \
  each(ftruncate64) each(mkdir) each(mkdirat) each(openat) each(pread64) each(preadv64) each(preadv64v2) \
  each(pwrite64) each(read) each(rmdir) each(unlink) each(unlinkat) each(write) each(writev)
#define DECLARE(name) static __typeof__(&name) real_##name;
NEXT(DECLARE)
#define REAL(name) real_##name
static void *next(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}
#define LOOK_UP(name) real_##name = (__typeof__(&name))next(#name);
__attribute__((constructor)) static void look_up(void) { NEXT(LOOK_UP) }

void shim_arm(int calls, long nth, int error, int sticky, const char *path) {
  armed_calls = 0;
  snprintf(armed_path, sizeof armed_path, "%s", path);
  armed_nth = nth;
  armed_error = error;
  armed_sticky = sticky;
  atomic_store(&seen, 0);
  armed_calls = calls;
}

long shim_seen(void) { return atomic_load(&seen); }

/* Note changes of what lies below a path in a file; a negative descriptor ends it. */
void shim_record(int descriptor, const char *path) {
  snprintf(logged_path, sizeof logged_path, "%s", path);
  log_descriptor = descriptor;
}

static void path_of(int descriptor, char path[PATH_MAX]) {
  char link[40];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length < 0 ? 0 : length] = 0;
}

/* The absolute path of a name below a folder's descriptor. */
static void path_at(int folder, const char *name, char path[PATH_MAX]) {
  if (name[0] == '/') {
    snprintf(path, PATH_MAX, "%s", name);
    return;
  }
  char base[PATH_MAX];
  if (folder == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) base[0] = 0;
  } else {
    path_of(folder, base);
  }
  if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) path[PATH_MAX - 1] = 0;
}

static int concerned(int kind) { return (armed_calls & kind) || (log_descriptor >= 0 && (CHANGES & kind)); }

/* The errno this call must end with, SHORT, or 0. */
static int fault(int kind, const char *path) {
  if (!(armed_calls & kind) || !strstr(path, armed_path)) return 0;
  long count = atomic_fetch_add(&seen, 1) + 1;
  return count == armed_nth || (armed_sticky && count > armed_nth) ? armed_error : 0;
}

static void note(const char *kind, long result, long long offset, const char *path, const char *second,
                 const void *data, size_t length) {
  if (log_descriptor < 0 || result < 0 || !strstr(path, logged_path)) return;
  char line[2 * PATH_MAX + 100];
  int count = snprintf(line, sizeof line, "%s %ld %lld %zu %s\t%s\n", kind, result, offset, length, path, second);
  int kept = errno;
  pthread_mutex_lock(&log_lock);
  struct iovec parts[] = {{line, (size_t)count}, {(void *)data, length}};
  if (REAL(writev)(log_descriptor, parts, 2) != (ssize_t)(count + length)) abort();
  pthread_mutex_unlock(&log_lock);
  errno = kept;
}

#define FAIL(kind, path)                     \
  do {                                       \
    int wanted = fault(kind, path);          \
    if (wanted > 0) {                        \
      errno = wanted;                        \
      return -1;                             \
    }                                        \
  } while (0)

/* Files and folders */

static int open_at(int folder, const char *name, int flags, mode_t mode) {
  int kind = flags & (O_CREAT | O_TRUNC) ? CREATE : OPEN;
  char path[PATH_MAX] = "";
  if (concerned(kind)) {
    path_at(folder, name, path);
    FAIL(kind, path);
  }
  int fresh = kind == CREATE && path[0] && access(path, F_OK) != 0;
  int descriptor = REAL(openat)(folder, name, flags, mode);
  if (kind == CREATE && path[0]) {
    if (fresh) note("create", descriptor, 0, path, "", "", 0);
    else if (flags & O_TRUNC) note("truncate", descriptor, 0, path, "", "", 0);
  }
  return descriptor;
}

#define MODE_OF(last)              \
  mode_t mode = 0;                 \
  if (flags & (O_CREAT | __O_TMPFILE)) { \
    va_list more;                  \
    va_start(more, last);          \
    mode = va_arg(more, mode_t);   \
    va_end(more);                  \
  }
int open(const char *name, int flags, ...) { MODE_OF(flags) return open_at(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE_OF(flags) return open_at(AT_FDCWD, name, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE_OF(flags) return open_at(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE_OF(flags) return open_at(folder, name, flags, mode); }

int close(int descriptor) {
  int wanted = 0;
  if (concerned(CLOSE) && (fcntl(descriptor, F_GETFL) & O_ACCMODE) != O_RDONLY) {
    char path[PATH_MAX];
    path_of(descriptor, path);
    wanted = fault(CLOSE, path);
  }
  int result = REAL(close)(descriptor);
  if (wanted > 0) {
    errno = wanted;
    return -1;
  }
  return result;
}

static int renamed(int from, const char *old, int to, const char *new, unsigned flags) {
  char old_path[PATH_MAX], new_path[PATH_MAX];
  if (concerned(RENAME)) {
    path_at(from, old, old_path);
    path_at(to, new, new_path);
    FAIL(RENAME, new_path);
  }
  int result = (int)syscall(SYS_renameat2, from, old, to, new, flags);
  if (concerned(RENAME)) note(flags & 2 ? "exchange" : "rename", result, 0, old_path, new_path, "", 0);
  return result;
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
  return renamed(from, old, to, new, flags);
}

#define PATH_CALL(kind, word, folder, name, call)      \
  char path[PATH_MAX];                                 \
  if (concerned(kind)) {                               \
    path_at(folder, name, path);                       \
    FAIL(kind, path);                                  \
  }                                                    \
  int result = call;                                   \
  if (concerned(kind)) note(word, result, 0, path, "", "", 0); \
  return result;
int mkdir(const char *name, mode_t mode) { PATH_CALL(MKDIR, "mkdir", AT_FDCWD, name, REAL(mkdir)(name, mode)) }
int mkdirat(int folder, const char *name, mode_t mode) {
  PATH_CALL(MKDIR, "mkdir", folder, name, REAL(mkdirat)(folder, name, mode))
}
int rmdir(const char *name) { PATH_CALL(RMDIR, "rmdir", AT_FDCWD, name, REAL(rmdir)(name)) }
int unlink(const char *name) { PATH_CALL(UNLINK, "unlink", AT_FDCWD, name, REAL(unlink)(name)) }
int unlinkat(int folder, const char *name, int flags) {
  int kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
  PATH_CALL(kind, kind == RMDIR ? "rmdir" : "unlink", folder, name, REAL(unlinkat)(folder, name, flags))
}
int chmod(const char *name, mode_t mode) { PATH_CALL(CHMOD, "chmod", AT_FDCWD, name, REAL(chmod)(name, mode)) }
int fchmodat(int folder, const char *name, mode_t mode, int flags) {
  PATH_CALL(CHMOD, "chmod", folder, name, REAL(fchmodat)(folder, name, mode, flags))
}

/* Contents */

#define DESCRIPTOR(kind)                \
  char path[PATH_MAX] = "";             \
  if (concerned(kind)) path_of(descriptor, path);

int fchmod(int descriptor, mode_t mode) {
  DESCRIPTOR(CHMOD)
  FAIL(CHMOD, path);
  return REAL(fchmod)(descriptor, mode);
}

static int synced(int descriptor, int (*sync)(int)) {
  DESCRIPTOR(FSYNC)
  FAIL(FSYNC, path);
  int result = sync(descriptor);
  note("fsync", result, 0, path, "", "", 0);
  return result;
}
int fsync(int descriptor) { return synced(descriptor, REAL(fsync)); }
int fdatasync(int descriptor) { return synced(descriptor, REAL(fdatasync)); }

static int truncated(int descriptor, off64_t length) {
  DESCRIPTOR(TRUNCATE)
  FAIL(TRUNCATE, path);
  int result = REAL(ftruncate64)(descriptor, length);
  note("truncate", result, length, path, "", "", 0);
  return result;
}
int ftruncate(int descriptor, off_t length) { return truncated(descriptor, length); }
int ftruncate64(int descriptor, off64_t length) { return truncated(descriptor, length); }

/* How many bytes of a call are done: all, half of them, or none with errno set. */
static ssize_t allowed(int kind, const char *path, size_t count) {
  int wanted = fault(kind, path);
  if (wanted > 0) {
    errno = wanted;
    return -1;
  }
  return wanted == SHORT && count > 1 ? (ssize_t)(count / 2) : (ssize_t)count;
}

ssize_t write(int descriptor, const void *data, size_t count) {
  DESCRIPTOR(WRITE)
  ssize_t part = allowed(WRITE, path, count);
  if (part < 0) return -1;
  ssize_t done = REAL(write)(descriptor, data, (size_t)part);
  if (log_descriptor >= 0 && done > 0)
    note("write", 0, lseek64(descriptor, 0, SEEK_CUR) - done, path, "", data, (size_t)done);
  return done;
}

static ssize_t written_at(int descriptor, const void *data, size_t count, off64_t offset) {
  DESCRIPTOR(WRITE)
  ssize_t part = allowed(WRITE, path, count);
  if (part < 0) return -1;
  ssize_t done = REAL(pwrite64)(descriptor, data, (size_t)part, offset);
  if (done > 0) note("write", 0, offset, path, "", data, (size_t)done);
  return done;
}
ssize_t pwrite(int descriptor, const void *data, size_t count, off_t offset) {
  return written_at(descriptor, data, count, offset);
}
ssize_t pwrite64(int descriptor, const void *data, size_t count, off64_t offset) {
  return written_at(descriptor, data, count, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  DESCRIPTOR(WRITE)
  if (allowed(WRITE, path, 1) < 0) return -1;
  ssize_t total = REAL(writev)(descriptor, parts, count);
  off64_t offset = log_descriptor >= 0 ? lseek64(descriptor, 0, SEEK_CUR) - total : 0;
  for (ssize_t i = 0, left = total; left > 0; i++) {
    size_t part = (size_t)left < parts[i].iov_len ? (size_t)left : parts[i].iov_len;
    note("write", 0, offset, path, "", parts[i].iov_base, part);
    offset += (off64_t)part;
    left -= (ssize_t)part;
  }
  return total;
}

ssize_t read(int descriptor, void *data, size_t count) {
  DESCRIPTOR(READ)
  ssize_t part = allowed(READ, path, count);
  return part < 0 ? -1 : REAL(read)(descriptor, data, (size_t)part);
}

static ssize_t read_at(int descriptor, void *data, size_t count, off64_t offset) {
  DESCRIPTOR(PREAD)
  ssize_t part = allowed(PREAD, path, count);
  return part < 0 ? -1 : REAL(pread64)(descriptor, data, (size_t)part, offset);
}
ssize_t pread(int descriptor, void *data, size_t count, off_t offset) {
  return read_at(descriptor, data, count, offset);
}
ssize_t pread64(int descriptor, void *data, size_t count, off64_t offset) {
  return read_at(descriptor, data, count, offset);
}

/* A short preadv fills its first buffer, half of it where there is one. */
static ssize_t read_parts(int descriptor, const struct iovec *parts, int count, off64_t offset) {
  DESCRIPTOR(PREAD)
  int wanted = fault(PREAD, path);
  if (wanted > 0) {
    errno = wanted;
    return -1;
  }
  if (wanted != SHORT) return REAL(preadv64)(descriptor, parts, count, offset);
  size_t first = count == 1 && parts[0].iov_len > 1 ? parts[0].iov_len / 2 : parts[0].iov_len;
  return REAL(pread64)(descriptor, parts[0].iov_base, first, offset);
}
ssize_t preadv(int descriptor, const struct iovec *parts, int count, off_t offset) {
  return read_parts(descriptor, parts, count, offset);
}
ssize_t preadv64(int descriptor, const struct iovec *parts, int count, off64_t offset) {
  return read_parts(descriptor, parts, count, offset);
}

ssize_t preadv2(int descriptor, const struct iovec *parts, int count, off_t offset, int flags) {
  return flags ? REAL(preadv64v2)(descriptor, parts, count, offset, flags)
               : read_parts(descriptor, parts, count, offset);
}
ssize_t preadv64v2(int descriptor, const struct iovec *parts, int count, off64_t offset, int flags) {
  return preadv2(descriptor, parts, count, offset, flags);
}

/* Copies inside the kernel: refused while changes are noted, so that their bytes come by write. */
#define COPIED(to, call)               \
  int descriptor = to;                 \
  DESCRIPTOR(COPY)                     \
  FAIL(COPY, path);                    \
  if (log_descriptor >= 0) {           \
    errno = EINVAL;                    \
    return -1;                         \
  }                                    \
  return call;
ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t count, unsigned flags) {
  COPIED(to, REAL(copy_file_range)(from, from_at, to, to_at, count, flags))
}
ssize_t sendfile(int to, int from, off_t *offset, size_t count) {
  COPIED(to, syscall(SYS_sendfile, to, from, offset, count))
}
ssize_t sendfile64(int to, int from, off64_t *offset, size_t count) {
  COPIED(to, syscall(SYS_sendfile, to, from, offset, count))
}
