/* What a compiled library's parallel loops call where the system has no threads: the calling one runs all of it. */
#include <stddef.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

/* As tvm/runtime/c_backend_api.h declares them, for C++ only. */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;
typedef int (*Lambda)(int task, TVMParallelGroupEnv *env, void *closure);

static int launch(Lambda lambda, void *closure, int num_task) {
  (void)num_task;
  TVMParallelGroupEnv env = {NULL, 1};
  return lambda(0, &env, closure);
}

/* The slot generated code calls through; hidden as in `thread_pool.c`. */
__attribute__((visibility("hidden"))) int (*__TVMBackendParallelLaunch)(Lambda, void *, int) = launch;

/* use_threads(count), as in `thread_pool.c`: here there is no other number than 1. */
int __tvm_ffi_use_threads(void *handle, const TVMFFIAny *args, int32_t num_args, TVMFFIAny *result) {
  (void)handle, (void)num_args, (void)result;
  if (args[0].v_int64 == 1) return 0;
  TVMFFIErrorSetRaisedFromCStr("ValueError", "this system has one thread");
  return -1;
}
