/* What the parts of the runtime share. Nothing here is for users: see gfrt.h. */
#ifndef GFRT_INTERNAL_H
#define GFRT_INTERNAL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "gfrt.h"

/* ---- errors (gfrt.c) ---- */

/* Leaves the message for gfrt_last_error and returns `status`. */
gfrt_status gfi_fail(gfrt_status status, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* ---- threads (gfrt_thread.c) ---- */

typedef struct gfi_caller gfi_caller;

/* What each thread has of its own. */
typedef struct {
    char last_error[512];
    gfi_caller *caller; /* of the kernel that the thread runs */
} gfi_thread;

gfi_thread *gfi_this_thread(void);

/* Rounds to nearest, keeps denormals and traps no exceptions on this thread, whatever it has set.
 * Returns what that was, for gfi_leave_float_mode. */
uint32_t gfi_enter_float_mode(void);
void gfi_leave_float_mode(uint32_t mode);

/* ---- SHA-256 (gfrt_sha256.c) ---- */

#define GFI_HASH_BYTES 32
void gfi_sha256(const void *data, size_t size, uint8_t hash[GFI_HASH_BYTES]);

/* ---- the plan (gfrt_plan.c) ----
 * The records of plan.bin as they lie in the file; plan.py writes them. */

#define GFI_PLAN_FORMAT 2
#define GFI_ALIGNMENT 64
#define GFI_MAX_ARGS 32

enum { GFI_CPU = 0, GFI_CUDA = 1 };
enum { GFI_ARENA = 0, GFI_WEIGHTS = 1 };
enum { GFI_X86_64 = 0, GFI_AARCH64 = 1 };

typedef struct {
    char magic[8];
    uint32_t format;
    uint32_t header_bytes;
    uint64_t plan_bytes;
    uint8_t hash[GFI_HASH_BYTES]; /* of everything after this field */
    uint8_t weights_hash[GFI_HASH_BYTES];
    uint64_t weights_bytes;
    uint64_t packed_bytes; /* at their end: int8 that weights.bin holds in four bits each */
    uint64_t arena_bytes;
    uint64_t workspace_bytes; /* per thread */
    uint32_t device;
    uint32_t capability[2]; /* of the GPU: major, minor */
    uint32_t arch;
    char library_id[72];
    char library[120];
    uint32_t tensors, steps, args, kernels, inputs, outputs, string_bytes;
    uint32_t cpu_features; /* a string: names with spaces between */
    uint32_t grouped;
    uint32_t reserved;
} gfi_header;

typedef struct {
    uint32_t name;
    uint32_t dtype;
    uint32_t space;
    uint32_t ndim;
    int64_t shape[GFRT_MAX_DIMS];
    uint64_t offset;
    float scale;
    int32_t zero_point;
    int32_t storage_offset;
    uint32_t reserved;
} gfi_tensor;

typedef struct {
    uint32_t kernel;
    uint32_t label;
    uint32_t first_arg;
    uint32_t args;
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared_bytes;
    uint32_t reserved;
} gfi_step;

typedef struct {
    uint32_t tensor;
    uint32_t written;
} gfi_arg;

typedef struct {
    uint32_t name;
    uint32_t reserved;
} gfi_kernel;

typedef struct {
    uint32_t name;
    uint32_t tensor;
    uint32_t normalized;
    float mean[3];
    float std[3];
    uint32_t reserved;
} gfi_io;

/* Packed weights whose groups have factors, uint8 among the weights that are stored as they are.
 * They lie in panels of `rows` rows; `shared` rows have their factors in common, one for each run
 * of `run` bytes. */
typedef struct {
    uint64_t offset;
    uint64_t bytes;
    uint64_t factors;
    uint32_t row_bytes;
    uint32_t rows;
    uint32_t shared;
    uint32_t run;
} gfi_grouped;

_Static_assert(sizeof(gfi_header) == 368, "as in plan.py");
_Static_assert(sizeof(gfi_grouped) == 40, "as in plan.py");
_Static_assert(sizeof(gfi_tensor) == 88, "as in plan.py");
_Static_assert(sizeof(gfi_step) == 48, "as in plan.py");
_Static_assert(sizeof(gfi_arg) == 8, "as in plan.py");
_Static_assert(sizeof(gfi_kernel) == 8, "as in plan.py");
_Static_assert(sizeof(gfi_io) == 40, "as in plan.py");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "plan.bin is little-endian");

/* A plan that was checked: every index, offset and string below is in range. */
typedef struct {
    void *data; /* the file */
    const gfi_header *header;
    const gfi_tensor *tensors;
    const gfi_step *steps;
    const gfi_arg *args;
    const gfi_kernel *kernels;
    const gfi_io *inputs;
    const gfi_io *outputs;
    const gfi_grouped *grouped;
    const char *strings;
    uint32_t level; /* which of the bundle's plans it is */
} gfi_plan;

/* The best plan of the bundle that this CPU can run, at most number `level`: plan.bin, which is for
 * the least CPU, or one of plan-1.bin, plan-2.bin, ... */
gfrt_status gfi_plan_read(const char *bundle, uint32_t level, gfi_plan *plan);
void gfi_plan_free(gfi_plan *plan);
size_t gfi_tensor_bytes(const gfi_tensor *tensor);

/* The whole of bundle/name in memory that the caller frees; at most `limit` bytes. One NUL, not
 * counted in `size`, follows. */
gfrt_status gfi_read_file(const char *bundle, const char *name, size_t limit, void **data,
                          size_t *size);

/* Whether this CPU can run the plan's kernels; GFRT_UNSUPPORTED names what it lacks. */
gfrt_status gfi_check_cpu(const gfi_plan *plan); /* gfrt_features.c */

#define GFI_MAX_LEVEL 7

/* ---- kernels ----
 * A kernel that TVM compiled asks the thread that it runs on for parallel launches and scratch.
 * Its library passes such requests to the `gfi_caller` that it was called with. So one runtime
 * can run the kernels of another bundle's library. */

typedef struct {
    void *sync;
    int32_t tasks;
} gfi_parallel; /* TVMParallelGroupEnv */

typedef int (*gfi_task)(int task, gfi_parallel *group, void *closure);

struct gfi_caller {
    int (*launch)(gfi_caller *caller, gfi_task task, void *closure, int tasks);
    void *(*allocate)(gfi_caller *caller, uint64_t size);
    int (*release)(gfi_caller *caller, void *memory);
    void (*error)(gfi_caller *caller, const char *const *parts, int32_t count);
};

typedef struct {
    int32_t type_index;
    uint32_t padding;
    union {
        int64_t integer;
        void *pointer;
    } value;
} gfi_any; /* TVMFFIAny */

typedef int32_t (*gfi_function)(void *self, const gfi_any *args, int32_t count, gfi_any *result);

typedef struct {
    const char *name;
    gfi_function function;
} gfi_entry;

#define GFI_TABLE_ABI 1

/* What a library exports as `gfrt_kernel_table`. The first two fields keep their place. */
typedef struct {
    uint32_t abi;
    uint32_t count;
    const char *library_id;
    const gfi_entry *entries;
    int32_t (*call)(gfi_caller *caller, gfi_function function, const gfi_any *args,
                    int32_t count);
    int (*call_task)(gfi_caller *caller, gfi_task task, int index, gfi_parallel *group,
                     void *closure);
} gfi_table;

/* gfrt_kernels.c: the functions of the table, and what the kernels' objects link against. */
int32_t gfi_call(gfi_caller *caller, gfi_function function, const gfi_any *args, int32_t count);
int gfi_call_task(gfi_caller *caller, gfi_task task, int index, gfi_parallel *group,
                  void *closure);

/* Generated when a library is linked. */
extern GFRT_API const gfi_table gfrt_kernel_table;

/* ---- worker threads (gfrt_pool.c) ---- */

typedef struct gfi_pool gfi_pool;

/* `threads` of them, the calling one included. Each has `workspace` bytes of scratch. Those that it
 * starts stay on `cpus`, unless that is null. */
gfrt_status gfi_pool_create(uint32_t threads, size_t workspace, const gfi_table *table,
                            const cpu_set_t *cpus, gfi_pool **pool);
void gfi_pool_destroy(gfi_pool *pool);
gfi_caller *gfi_pool_caller(gfi_pool *pool);
/* An inference begins: wakes the threads, which then look for loops until it ends. */
void gfi_pool_begin(gfi_pool *pool);
void gfi_pool_end(gfi_pool *pool);
/* As memcpy, by all threads. */
void gfi_pool_copy(gfi_pool *pool, void *to, const void *from, size_t size);
/* Before a run: forgets what kernels complained about, and the scratch they did not release. */
void gfi_pool_reset(gfi_pool *pool);
/* What a kernel complained about since then; "" if it did not. */
const char *gfi_pool_message(const gfi_pool *pool);

/* ---- devices ---- */

typedef struct gfi_device gfi_device;

struct gfrt_model {
    gfi_plan plan;
    const gfi_device *device;
    void *loaded;         /* what the device made of the model */
    const void *weights;  /* mapped from weights.bin, or brought to their size from it */
    char *bundle;
    char name[96];        /* of the device */
    atomic_size_t users;  /* the caller, and each context */
};

struct gfrt_context {
    gfrt_model *model;
    void *state; /* what the device keeps for this context */
    gfrt_observer observer;
    void *user;
    bool profiling;
    uint64_t calls;
    double *seconds; /* per step */
    atomic_flag busy;
};

struct gfi_device {
    gfrt_status (*load)(gfrt_model *model);
    void (*unload)(gfrt_model *model);
    gfrt_status (*create)(gfrt_context *context, uint32_t threads);
    void (*destroy)(gfrt_context *context);
    /* Copies to or from a tensor of the arena; the copy is done when it returns. */
    gfrt_status (*write)(gfrt_context *context, const gfi_tensor *tensor, const void *data);
    gfrt_status (*read)(gfrt_context *context, const gfi_tensor *tensor, void *data);
    /* Runs every step; tells the observer, and adds to `seconds` if the context is profiling. */
    gfrt_status (*run)(gfrt_context *context);
    /* Called when an observer is set: memory for it, where the device needs some. */
    gfrt_status (*observe)(gfrt_context *context);
};

extern const gfi_device gfi_cpu_device;

extern const gfi_device gfi_cuda_device;

/* Null in a library that was linked without gfrt_cuda.c. */
extern const gfi_device *const gfi_cuda;

void gfi_tensor_info(const gfrt_model *model, const gfi_tensor *tensor, const char *name,
                     gfrt_tensor_info *info);
const char *gfi_string(const gfi_plan *plan, uint32_t offset);
double gfi_now(void);

/* Hands each tensor that `step` wrote to the observer; `data` gives where a tensor lies. */
void gfi_notify(gfrt_context *context, size_t step,
                const void *(*data)(gfrt_context *context, const gfi_tensor *tensor));

#endif
