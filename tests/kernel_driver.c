/* Calls one kernel: `driver NAME IN OUT` reads its arrays from IN and writes them to OUT as the kernel left them.
 *
 * An array is its rank, DLPack type code and bits (int32), its bytes and shape (int64), and its content. KERNELS names
 * all kernels there are, each as KERNEL(name).
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#define MOST_ARRAYS 16
#define MOST_AXES 8
#define ALIGNMENT 64

typedef int (*Kernel)(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
#define KERNEL(name) int __tvm_ffi_##name(void *, const TVMFFIAny *, int32_t, TVMFFIAny *);
KERNELS
#undef KERNEL
#define KERNEL(name) {#name, __tvm_ffi_##name},
static const struct {
  const char *name;
  Kernel call;
} kernels[] = {KERNELS};

/* What TVM's runtime does with an error; kernels under test raise none. */
static void fail(const char *message) {
  fprintf(stderr, "%s\n", message);
  exit(1);
}
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { (void)kind, fail(message); }
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  (void)kind, fail(count > 0 ? parts[0] : "error");
}

/* What threads would share, one does. */
typedef struct {
  void *sync_handle;
  int32_t num_task;
} TVMParallelGroupEnv;
typedef int (*Lambda)(int task, TVMParallelGroupEnv *env, void *closure);
static int launch(Lambda turns, void *closure, int tasks) {
  TVMParallelGroupEnv env = {NULL, 1};
  (void)tasks;
  return turns(0, &env, closure);
}
int (*__TVMBackendParallelLaunch)(Lambda, void *, int) = launch;

static void take(void *place, size_t bytes, FILE *file) {
  if (fread(place, 1, bytes, file) != bytes) fail("the input ends early");
}

int main(int argc, char **argv) {
  static DLTensor tensors[MOST_ARRAYS];
  static TVMFFIAny arguments[MOST_ARRAYS];
  static int64_t shapes[MOST_ARRAYS][MOST_AXES], bytes[MOST_ARRAYS];
  FILE *in = argc == 4 ? fopen(argv[2], "rb") : NULL, *out = argc == 4 ? fopen(argv[3], "wb") : NULL;
  if (in == NULL || out == NULL) fail("usage: driver NAME IN OUT");
  int32_t count = 0;
  for (int32_t header[3]; fread(header, sizeof header, 1, in) == 1; ++count) {
    if (count == MOST_ARRAYS || header[0] > MOST_AXES) fail("too many arrays or axes");
    DLTensor *tensor = &tensors[count];
    take(&bytes[count], sizeof bytes[count], in);
    take(shapes[count], (size_t)header[0] * sizeof(int64_t), in);
    tensor->data = aligned_alloc(ALIGNMENT, ((size_t)bytes[count] / ALIGNMENT + 1) * ALIGNMENT);
    take(tensor->data, (size_t)bytes[count], in);
    tensor->device.device_type = kDLCPU;
    tensor->ndim = header[0];
    tensor->dtype = (DLDataType){(uint8_t)header[1], (uint8_t)header[2], 1};
    tensor->shape = shapes[count];
    arguments[count].type_index = kTVMFFIDLTensorPtr;
    arguments[count].v_ptr = tensor;
  }
  for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; ++i) {
    if (strcmp(kernels[i].name, argv[1]) != 0) continue;
    TVMFFIAny result = {0};
    if (kernels[i].call(NULL, arguments, count, &result) != 0) fail("the kernel failed");
    for (int32_t each = 0; each < count; ++each) fwrite(tensors[each].data, 1, (size_t)bytes[each], out);
    return fclose(out);
  }
  fail("there is no such kernel");
}
