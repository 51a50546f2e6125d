/* The threads of a compiled library: what its parallel loops call in place of TVM's own pool.
 *
 * A launch is a job of more tasks than threads. The calling thread and the workers claim tasks one by one, and the
 * caller waits only for tasks a worker has begun: a worker the system doesn't run, because another process has its
 * core, holds up nothing. Who waits spins for SPIN_NS, letting others have the core, and then sleeps.
 */
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <tvm/ffi/c_api.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define CACHE_LINE 128  /* two lines of 64: x86 fetches them in pairs, some Arm cores have lines of 128 */
#define MAX_THREADS 256  /* `engram_runtime.executor.MOST_THREADS` */
#define AS_TEXT_(value) #value
#define AS_TEXT(value) AS_TEXT_(value)
#define TASKS_PER_THREAD 8
#define SPIN_NS 50000
#define SPINS_PER_LOOK 16  /* at the clock, and for others that want the core */

/* As tvm/runtime/c_backend_api.h declares them, for C++ only. */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;
typedef int (*Lambda)(int task, TVMParallelGroupEnv *env, void *closure);

/* What is written by different threads stands in different cache lines. */
static struct {
  /* Number of the job, its tasks (16 bits), and the next one nobody has claimed (16 bits). */
  _Alignas(CACHE_LINE) _Atomic uint64_t ticket;
  _Alignas(CACHE_LINE) atomic_uint finished;  /* tasks finished by workers */
  atomic_uint caller_sleeps;
  _Alignas(CACHE_LINE) atomic_uint jobs;  /* how many were published */
  atomic_uint workers_sleep;
  atomic_uint wanted;  /* workers: those of a higher index sleep until it changes */
  atomic_uint closing;
  atomic_flag busy;
  Lambda lambda;  /* of the job; read only by who has claimed one of its tasks */
  void *closure;
  TVMParallelGroupEnv env;
  _Atomic TVMFFIObjectHandle error;  /* the first one a task raised */
  atomic_int status;
} pool = {.busy = ATOMIC_FLAG_INIT};

static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
static pthread_t workers[MAX_THREADS];
static unsigned started;  /* workers, under the mutex */

#ifdef __linux__
static void sleep_while(atomic_uint *word, unsigned seen) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void wake_all(atomic_uint *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0); }
#else
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t woken = PTHREAD_COND_INITIALIZER;

static void sleep_while(atomic_uint *word, unsigned seen) {
  pthread_mutex_lock(&sleeping);
  if (atomic_load(word) == seen) pthread_cond_wait(&woken, &sleeping);
  pthread_mutex_unlock(&sleeping);
}

static void wake_all(atomic_uint *word) {
  (void)word;
  pthread_mutex_lock(&sleeping);
  pthread_cond_broadcast(&woken);
  pthread_mutex_unlock(&sleeping);
}
#endif

static void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Return once *word is not what was seen, or after waking for another reason; *sleeps tells who changes it. */
static void await_change(atomic_uint *word, unsigned seen, atomic_uint *sleeps) {
  int64_t end = now_ns() + SPIN_NS;
  do {
    for (int i = 0; i < SPINS_PER_LOOK; ++i) {
      if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
      pause_briefly();
    }
    sched_yield();
  } while (now_ns() < end);
  atomic_store(sleeps, 1);
  if (atomic_load(word) == seen) sleep_while(word, seen);
}

static void add(atomic_uint *word, unsigned count, atomic_uint *sleeps) {
  atomic_fetch_add(word, count);
  if (atomic_load(sleeps) && atomic_exchange(sleeps, 0)) wake_all(word);
}

/* Return a task of the job that is now the caller's to run, or -1. */
static int claim_task(void) {
  uint64_t ticket = atomic_load_explicit(&pool.ticket, memory_order_relaxed);
  while ((ticket & 0xffff) < (ticket >> 16 & 0xffff))
    if (atomic_compare_exchange_weak_explicit(&pool.ticket, &ticket, ticket + 1, memory_order_acquire,
                                              memory_order_relaxed))
      return (int)(ticket & 0xffff);
  return -1;
}

/* Take the error from this thread, which the one that launched the job can't see. */
static void keep_error(int status) {
  TVMFFIObjectHandle error, none = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  atomic_store(&pool.status, status);
  if (!atomic_compare_exchange_strong(&pool.error, &none, error)) TVMFFIObjectDecRef(error);
}

/* Run tasks until all are claimed; returns how many. */
static unsigned run_tasks(void) {
  unsigned count = 0;
  for (int task; (task = claim_task()) >= 0; ++count) {
    int status = pool.lambda(task, &pool.env, pool.closure);
    if (status != 0) keep_error(status);
  }
  return count;
}

static void *work(void *index) {
  for (;;) {
    /* Read before closing is: what changes after it is set differs from them, so nobody sleeps through it. */
    unsigned wanted = atomic_load(&pool.wanted), jobs = atomic_load(&pool.jobs);
    if (atomic_load(&pool.closing)) return NULL;
    if ((uintptr_t)index >= wanted) {
      sleep_while(&pool.wanted, wanted);
      continue;
    }
    unsigned count = run_tasks();
    if (count > 0) add(&pool.finished, count, &pool.caller_sleeps);
    await_change(&pool.jobs, jobs, &pool.workers_sleep);
  }
}

static int raise_kept_error(void) {
  int status = atomic_exchange(&pool.status, 0);
  TVMFFIObjectHandle error = atomic_exchange(&pool.error, NULL);
  if (error != NULL) {
    TVMFFIErrorSetRaised(error);
    TVMFFIObjectDecRef(error);
  }
  return status;
}

static int run_job(Lambda lambda, void *closure, int tasks) {
  pool.lambda = lambda;
  pool.closure = closure;
  pool.env.num_task = tasks;
  atomic_store(&pool.finished, 0);
  uint64_t job = atomic_load(&pool.jobs);
  atomic_store(&pool.ticket, job << 32 | (uint64_t)tasks << 16);
  add(&pool.jobs, 1, &pool.workers_sleep);
  unsigned others = (unsigned)tasks - run_tasks(), finished;
  while ((finished = atomic_load(&pool.finished)) != others) await_change(&pool.finished, finished, &pool.caller_sleeps);
  return raise_kept_error();
}

/* Run all tasks: alone where the pool has no workers or works for another thread or the one that launched this. */
static int launch(Lambda lambda, void *closure, int num_task) {
  unsigned wanted = atomic_load_explicit(&pool.wanted, memory_order_relaxed);
  if (wanted == 0 || atomic_flag_test_and_set(&pool.busy)) {
    TVMParallelGroupEnv env = {NULL, 1};
    return lambda(0, &env, closure);
  }
  (void)num_task;  /* 0 in generated code: as many as suit */
  int status = run_job(lambda, closure, (int)(wanted + 1) * TASKS_PER_THREAD);
  atomic_flag_clear(&pool.busy);
  return status;
}

/* The slot generated code calls through; hidden, or TVM's runtime would fill it when the library is opened. */
__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(Lambda, void *, int) = launch;

/* A child after fork has none of the workers, and whatever they were doing is lost to it. */
static void forget_workers(void) {
  pthread_mutex_init(&starting, NULL);
  started = 0;
  atomic_store(&pool.wanted, 0);
  atomic_store(&pool.ticket, 0);
  atomic_store(&pool.status, 0);
  atomic_store(&pool.error, NULL);
  atomic_flag_clear(&pool.busy);
}

__attribute__((constructor)) static void when_opened(void) { pthread_atfork(NULL, NULL, forget_workers); }

__attribute__((destructor)) static void when_closed(void) {
  atomic_store(&pool.closing, 1);
  atomic_fetch_add(&pool.wanted, 1);
  wake_all(&pool.wanted);
  atomic_fetch_add(&pool.jobs, 1);
  wake_all(&pool.jobs);
  while (started > 0) pthread_join(workers[--started], NULL);
}

/* use_threads(count): let launches use so many threads, the calling one among them. */
int __tvm_ffi_use_threads(void *handle, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)handle, (void)num_args, (void)result;
  int failed = 0;
  if (args[0].v_int64 < 1 || args[0].v_int64 > MAX_THREADS) {
    TVMFFIErrorSetRaisedFromCStr("ValueError", "threads must be 1 to " AS_TEXT(MAX_THREADS));
    return -1;
  }
  unsigned wanted = (unsigned)args[0].v_int64 - 1;
  pthread_mutex_lock(&starting);
  if (wanted != atomic_load(&pool.wanted)) {
    atomic_store(&pool.wanted, wanted);
    wake_all(&pool.wanted);
  }
  while (started < wanted && !failed) {
    failed = pthread_create(&workers[started], NULL, work, (void *)(uintptr_t)started);
    if (!failed) ++started;
  }
  pthread_mutex_unlock(&starting);
  if (!failed) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", "no further thread can be started; use a smaller number of threads");
  return -1;
}
