/* Runs the functions of one scheduled kernel over tensors from a file, natively or under qemu.
 *
 *     run_kernel IN OUT REPEAT THREADS
 *
 * Every tensor lies 64-byte aligned with an unmapped page behind its last 64-byte block, so that
 * a read beyond it faults; the bytes around it are a pattern that is checked at the end (exit 3).
 * STEPS, given by -D, lists the calls: STEP(function, tensor numbers...).
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
  void *data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;

typedef struct {
  int32_t type_index, zero;
  DLTensor *tensor;
} FfiAny;

typedef struct {
  void *sync_handle;
  int32_t num_task;
} ParallelGroup;

enum { PAGE = 4096, ALIGN = 64, PATTERN = 0xA5, MAX_TENSORS = 16, MAX_DIMS = 8, DL_TENSOR = 7 };

static int threads = 1;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

/* One task after the other: what matters here is that every split gives the same result. */
static int launch(int (*task)(int, ParallelGroup *, void *), void *closure, int count) {
  ParallelGroup group = {NULL, count > 0 ? count : threads};
  for (int i = group.num_task - 1; i >= 0; i--)
    if (task(i, &group, closure) != 0) return -1;
  return 0;
}

static void *no_workspace(int type, int id, uint64_t size, int code, int bits) {
  (void)type, (void)id, (void)code, (void)bits;
  fprintf(stderr,
          "a kernel asks for %llu bytes of workspace: keep buffers in scope global and within 1 KB\n",
          (unsigned long long)size);
  exit(4);
}

extern int (*__TVMBackendParallelLaunch)(int (*)(int, ParallelGroup *, void *), void *, int)
    __attribute__((weak));
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));

#define STEP(function, ...) int32_t function(void *, FfiAny *, int32_t, FfiAny *);
STEPS
#undef STEP

typedef struct {
  unsigned char *map, *data;
  size_t map_size, size;
} Guarded;

static void must(int ok, const char *what) {
  if (!ok) {
    perror(what);
    exit(2);
  }
}

static Guarded guarded(size_t size) {
  size_t padded = (size + ALIGN - 1) / ALIGN * ALIGN;
  size_t pages = (padded + PAGE - 1) / PAGE * PAGE;
  Guarded g = {NULL, NULL, pages, size};
  g.map = mmap(NULL, pages + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  must(g.map != MAP_FAILED, "mmap");
  must(mprotect(g.map + pages, PAGE, PROT_NONE) == 0, "mprotect");
  memset(g.map, PATTERN, pages);
  g.data = g.map + pages - padded;
  return g;
}

static int untouched(const Guarded *g) {
  for (const unsigned char *p = g->map; p < g->map + g->map_size; p++)
    if ((p < g->data || p >= g->data + g->size) && *p != PATTERN) return 0;
  return 1;
}

int main(int argc, char **argv) {
  must(argc == 5, "usage");
  FILE *in = fopen(argv[1], "rb");
  must(in != NULL, argv[1]);
  threads = atoi(argv[4]);
#if defined(__x86_64__)
  /* AMX's tiles, for kernels that use them; others do not mind a refusal. */
  syscall(SYS_arch_prctl, 0x1023, 18);
#endif
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = no_workspace;

  int32_t count;
  must(fread(&count, sizeof count, 1, in) == 1 && count <= MAX_TENSORS, "tensor count");
  static int64_t shapes[MAX_TENSORS][MAX_DIMS];
  Guarded memory[MAX_TENSORS];
  DLTensor tensors[MAX_TENSORS];
  for (int32_t i = 0; i < count; i++) {
    int32_t head[3];  /* type code, bits, dimensions */
    must(fread(head, sizeof head, 1, in) == 1 && head[2] <= MAX_DIMS, "tensor head");
    must(fread(shapes[i], sizeof(int64_t), (size_t)head[2], in) == (size_t)head[2], "shape");
    size_t size = (size_t)head[1] / 8;
    for (int32_t d = 0; d < head[2]; d++) size *= (size_t)shapes[i][d];
    memory[i] = guarded(size);
    must(fread(memory[i].data, 1, size, in) == size, "tensor data");
    tensors[i] = (DLTensor){memory[i].data, 1, 0, head[2], (uint8_t)head[0], (uint8_t)head[1], 1,
                            shapes[i], NULL, 0};
  }
  fclose(in);

  for (int repeat = atoi(argv[3]); repeat > 0; repeat--) {
    FfiAny result = {0};
#define STEP(function, ...)                                               \
  {                                                                       \
    const int numbers[] = {__VA_ARGS__};                                  \
    const int32_t n = (int32_t)(sizeof numbers / sizeof *numbers);        \
    FfiAny args[sizeof numbers / sizeof *numbers];                        \
    for (int32_t i = 0; i < n; i++)                                       \
      args[i] = (FfiAny){DL_TENSOR, 0, &tensors[numbers[i]]};             \
    if (function(NULL, args, n, &result) != 0) return 1;                  \
  }
    STEPS
#undef STEP
  }

  FILE *out = fopen(argv[2], "wb");
  must(out != NULL, argv[2]);
  for (int32_t i = 0; i < count; i++) {
    if (!untouched(&memory[i])) {
      fprintf(stderr, "tensor %d was written outside of its bounds\n", (int)i);
      return 3;
    }
    must(fwrite(memory[i].data, 1, memory[i].size, out) == memory[i].size, argv[2]);
  }
  fclose(out);
  return 0;
}
