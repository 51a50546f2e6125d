/* Scratch memory of a compiled library's kernels, in place of TVM's: a stack for each thread.
 *
 * Generated code asks for it several times in every turn of a parallel loop, even for a vector, and gives it back in
 * the reverse order. Sizes that don't fit, those of whole matrices, come from the heap.
 */
#include <stdint.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

#define ALIGNMENT 64  /* vector loads need it */
#define STACK_BYTES (512 << 10)

static _Thread_local _Alignas(ALIGNMENT) char stack[STACK_BYTES];
static _Thread_local uint64_t used;

static void *allocate(int device_type, int device_id, uint64_t bytes, int type_code, int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  uint64_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  if (rounded <= STACK_BYTES - used) {
    used += rounded;
    return stack + used - rounded;
  }
  void *place = aligned_alloc(ALIGNMENT, rounded);
  if (place == NULL) TVMFFIErrorSetRaisedFromCStr("RuntimeError", "there is no memory left for a kernel");
  return place;
}

static int release(int device_type, int device_id, void *place) {
  (void)device_type, (void)device_id;
  uintptr_t offset = (uintptr_t)place - (uintptr_t)stack;
  if (offset < STACK_BYTES) {
    used = offset;
  } else {
    free(place);
  }
  return 0;
}

/* The slots generated code calls through; hidden, or TVM's runtime would fill them when the library is opened. */
#define SLOT __attribute__((visibility("hidden")))
SLOT void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
SLOT int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;
