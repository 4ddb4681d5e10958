/* What kernels compiled by TVM link against: each request goes to the caller of the kernel.
 * The declarations follow TVM 0.27's c_backend_api.h and tvm-ffi's c_api.h. */
#include "gfrt_internal.h"

/* Kernels have no argument through which they could hand the caller back: the thread keeps it. */
int32_t gfi_call(gfi_caller *caller, gfi_function function, const gfi_any *args, int32_t count) {
    gfi_thread *thread = gfi_this_thread();
    gfi_caller *outer = thread->caller;
    gfi_any result = {0};
    thread->caller = caller;
    int32_t code = function(NULL, args, count, &result);
    thread->caller = outer;
    return code;
}

int gfi_call_task(gfi_caller *caller, gfi_task task, int index, gfi_parallel *group,
                  void *closure) {
    gfi_thread *thread = gfi_this_thread();
    gfi_caller *outer = thread->caller;
    thread->caller = caller;
    int code = task(index, group, closure);
    thread->caller = outer;
    return code;
}

static int parallel_launch(gfi_task task, void *closure, int tasks) {
    gfi_caller *caller = gfi_this_thread()->caller;
    return caller->launch(caller, task, closure, tasks);
}

static void *allocate_workspace(int device_type, int device_id, uint64_t size, int code, int bits) {
    (void)device_type, (void)device_id, (void)code, (void)bits;
    gfi_caller *caller = gfi_this_thread()->caller;
    return caller->allocate(caller, size);
}

static int free_workspace(int device_type, int device_id, void *memory) {
    (void)device_type, (void)device_id;
    gfi_caller *caller = gfi_this_thread()->caller;
    return caller->release(caller, memory);
}

/* The objects hold weak definitions of these pointers; ours win, already filled in. */
extern int (*const __TVMBackendParallelLaunch)(gfi_task, void *, int);
extern void *(*const __TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*const __TVMBackendFreeWorkspace)(int, int, void *);
int (*const __TVMBackendParallelLaunch)(gfi_task, void *, int) = parallel_launch;
void *(*const __TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate_workspace;
int (*const __TVMBackendFreeWorkspace)(int, int, void *) = free_workspace;

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char *const *parts, int32_t count);
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char *const *parts, int32_t count) {
    (void)kind;
    gfi_caller *caller = gfi_this_thread()->caller;
    caller->error(caller, parts, count);
}
