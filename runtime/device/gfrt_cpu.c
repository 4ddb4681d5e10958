/* Runs a plan on the CPU, with the kernels of this library or of the bundle's own. */
#include <dlfcn.h>
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "gfrt_cores.h"
#include "gfrt_internal.h"

#define MAX_THREADS 256
#define HUGE_PAGE ((size_t)2 << 20) /* where a page has 4 KB */

/* DLPack's tensor (dlpack.h, version 1). */
typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape;
    const int64_t *strides;
    uint64_t byte_offset;
} dl_tensor;

#define DL_CPU 1
#define ANY_DL_TENSOR 7 /* kTVMFFIDLTensorPtr */

typedef struct {
    void *library; /* of the bundle, if the kernels are not in this one */
    const gfi_table *table;
    gfi_function functions[]; /* per kernel of the plan */
} cpu_model;

typedef struct {
    int64_t strides[GFRT_MAX_DIMS];
    dl_tensor tensor;
} cpu_tensor;

typedef struct {
    char *arena;
    gfi_pool *pool;
    cpu_tensor *tensors;
    gfi_any *args; /* as the plan's */
    bool stays;    /* off the CPUs that are not `big` */
    cpu_set_t big;
} cpu_context;

static const struct {
    uint8_t code, bits;
} DL_TYPES[] = {
    [GFRT_FLOAT32] = {2, 32}, [GFRT_INT8] = {0, 8},   [GFRT_UINT8] = {1, 8}, [GFRT_INT32] = {0, 32},
    [GFRT_UINT16] = {1, 16},  [GFRT_INT64] = {0, 64}, [GFRT_BOOL] = {6, 8},
    [GFRT_INT16] = {0, 16},   [GFRT_FLOAT16] = {2, 16},
};

/* ---- models ---- */

static gfrt_status find_table(gfrt_model *model, cpu_model *cpu) {
    const gfi_header *header = model->plan.header;
    if (strcmp(header->library_id, gfrt_kernel_table.library_id) == 0) {
        cpu->table = &gfrt_kernel_table;
        return GFRT_OK;
    }
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/%s", model->bundle, header->library);
    if (length < 0 || (size_t)length >= sizeof path)
        return gfi_fail(GFRT_BAD_ARGUMENT, "the path of the bundle is too long");
    /* A path without a slash would be looked for elsewhere; this one has one. */
    cpu->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!cpu->library)
        return gfi_fail(GFRT_NOT_FOUND, "the library of the bundle cannot be loaded: %s",
                        dlerror());
    cpu->table = dlsym(cpu->library, "gfrt_kernel_table");
    if (!cpu->table || cpu->table->abi != GFI_TABLE_ABI)
        return gfi_fail(GFRT_UNSUPPORTED, "%s goes with another runtime than this one: "
                                          "load it instead of this library", path);
    if (strcmp(header->library_id, cpu->table->library_id) != 0)
        return gfi_fail(GFRT_DAMAGED, "%s and plan.bin do not belong together (%s, %s): copy the "
                                      "bundle again", path, cpu->table->library_id,
                        header->library_id);
    return GFRT_OK;
}

static gfi_function find_function(const gfi_table *table, const char *name) {
    for (uint32_t i = 0; i < table->count; i++) {
        if (strcmp(table->entries[i].name, name) == 0)
            return table->entries[i].function;
    }
    return NULL;
}

static void cpu_unload(gfrt_model *model) {
    cpu_model *cpu = model->loaded;
    if (cpu && cpu->library)
        dlclose(cpu->library);
    free(cpu);
    model->loaded = NULL;
}

static gfrt_status cpu_load(gfrt_model *model) {
    const gfi_plan *plan = &model->plan;
    uint32_t kernels = plan->header->kernels;
    cpu_model *cpu = calloc(1, sizeof *cpu + kernels * sizeof cpu->functions[0]);
    if (!cpu)
        return gfi_fail(GFRT_NO_MEMORY, "no memory for a model");
    model->loaded = cpu;
    snprintf(model->name, sizeof model->name, "cpu");
    gfrt_status status = find_table(model, cpu);
    for (uint32_t i = 0; i < kernels && status == GFRT_OK; i++) {
        const char *name = gfi_string(plan, plan->kernels[i].name);
        cpu->functions[i] = find_function(cpu->table, name);
        if (!cpu->functions[i])
            status = gfi_fail(GFRT_DAMAGED, "the library of the bundle has no kernel %s", name);
    }
    if (status != GFRT_OK)
        cpu_unload(model);
    return status;
}

/* ---- contexts ---- */

/* How many CPUs threads of 0 stand for, and which: `big` are those that count. */
static uint32_t count_big(cpu_context *state) {
    if (sched_getaffinity(0, sizeof state->big, &state->big) != 0)
        return 1;
    int all = CPU_COUNT(&state->big);
    gfi_keep_big(GFI_CPUS, &state->big);
    int count = CPU_COUNT(&state->big);
    state->stays = count < all;
    return count < 1 ? 1 : count > MAX_THREADS ? MAX_THREADS : (uint32_t)count;
}

static void fill_tensor(const gfrt_model *model, const cpu_context *state, const gfi_tensor *from,
                        cpu_tensor *to) {
    const char *space = from->space == GFI_ARENA ? state->arena : (const char *)model->weights;
    int64_t stride = 1;
    for (uint32_t i = from->ndim; i-- > 0; stride *= from->shape[i])
        to->strides[i] = stride;
    to->tensor = (dl_tensor){
        .data = (void *)(space + from->offset),
        .device_type = DL_CPU,
        .ndim = (int32_t)from->ndim,
        .code = DL_TYPES[from->dtype].code,
        .bits = DL_TYPES[from->dtype].bits,
        .lanes = 1,
        .shape = from->shape,
        .strides = to->strides,
    };
}

/* Whether an arena is to be made of huge pages: not one that is small beside them. */
static bool is_huge(size_t arena) { return arena >= HUGE_PAGE / 4 && arena <= SIZE_MAX / 2; }

static size_t mapped_bytes(size_t arena) {
    return is_huge(arena) ? (arena + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE : arena;
}

/* Memory for activations, in huge pages if the kernel has some to give: the weights, which all pass
 * by in every inference, take the place of small pages in the TLB. */
static char *map_arena(size_t arena) {
    size_t size = mapped_bytes(arena), spare = is_huge(arena) ? HUGE_PAGE : 0;
    void *mapped =
        mmap(NULL, size + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED)
        return NULL;
    if (!spare)
        return mapped;
    size_t before = (HUGE_PAGE - (uintptr_t)mapped % HUGE_PAGE) % HUGE_PAGE;
    char *aligned = (char *)mapped + before;
    if (before > 0)
        munmap(mapped, before);
    munmap(aligned + size, spare - before);
    madvise(aligned, size, MADV_HUGEPAGE);
    return aligned;
}

static void cpu_destroy(gfrt_context *context) {
    cpu_context *state = context->state;
    if (!state)
        return;
    if (state->pool)
        gfi_pool_destroy(state->pool);
    if (state->arena)
        munmap(state->arena, mapped_bytes((size_t)context->model->plan.header->arena_bytes));
    free(state->tensors);
    free(state->args);
    free(state);
    context->state = NULL;
}

static gfrt_status cpu_create(gfrt_context *context, uint32_t threads) {
    const gfrt_model *model = context->model;
    const gfi_plan *plan = &model->plan;
    const gfi_header *header = plan->header;
    const cpu_model *cpu = model->loaded;
    if (threads > MAX_THREADS)
        return gfi_fail(GFRT_BAD_ARGUMENT, "%u threads are too many: at most %d", threads,
                        MAX_THREADS);
    cpu_context *state = calloc(1, sizeof *state);
    if (!state)
        return gfi_fail(GFRT_NO_MEMORY, "no memory for a context");
    context->state = state;
    state->tensors = calloc(header->tensors + 1u, sizeof *state->tensors);
    state->args = calloc(header->args + 1u, sizeof *state->args);
    size_t arena = (size_t)header->arena_bytes;
    state->arena = map_arena(arena);
    gfrt_status status = GFRT_OK;
    if (!state->tensors || !state->args || !state->arena)
        status = gfi_fail(GFRT_NO_MEMORY, "no memory for the %zu bytes of activations", arena);
    if (status == GFRT_OK)
        status = gfi_pool_create(threads ? threads : count_big(state),
                                 (size_t)header->workspace_bytes, cpu->table,
                                 state->stays ? &state->big : NULL, &state->pool);
    if (status != GFRT_OK) {
        cpu_destroy(context);
        return status;
    }
    for (uint32_t i = 0; i < header->tensors; i++)
        fill_tensor(model, state, &plan->tensors[i], &state->tensors[i]);
    for (uint32_t i = 0; i < header->args; i++) {
        state->args[i].type_index = ANY_DL_TENSOR;
        state->args[i].value.pointer = &state->tensors[plan->args[i].tensor].tensor;
    }
    return GFRT_OK;
}

static const void *arena_data(gfrt_context *context, const gfi_tensor *tensor) {
    const cpu_context *state = context->state;
    return state->arena + tensor->offset;
}

static gfrt_status cpu_write(gfrt_context *context, const gfi_tensor *tensor, const void *data) {
    const cpu_context *state = context->state;
    gfi_pool_begin(state->pool);
    gfi_pool_copy(state->pool, state->arena + tensor->offset, data, gfi_tensor_bytes(tensor));
    return GFRT_OK;
}

static gfrt_status cpu_read(gfrt_context *context, const gfi_tensor *tensor, void *data) {
    memcpy(data, arena_data(context, tensor), gfi_tensor_bytes(tensor));
    return GFRT_OK;
}

static gfrt_status step_failed(const gfrt_context *context, const gfi_step *step, int32_t code) {
    const gfi_plan *plan = &context->model->plan;
    const cpu_context *state = context->state;
    const char *message = gfi_pool_message(state->pool);
    return gfi_fail(GFRT_FAILED, "kernel %s (%s) failed with %d%s%s",
                    gfi_string(plan, plan->kernels[step->kernel].name),
                    gfi_string(plan, step->label), code, *message ? ": " : "", message);
}

static gfrt_status run_steps(gfrt_context *context) {
    const gfi_plan *plan = &context->model->plan;
    const cpu_model *cpu = context->model->loaded;
    const cpu_context *state = context->state;
    gfi_caller *caller = gfi_pool_caller(state->pool);
    gfi_pool_reset(state->pool);
    for (uint32_t i = 0; i < plan->header->steps; i++) {
        const gfi_step *step = &plan->steps[i];
        double start = context->profiling ? gfi_now() : 0;
        int32_t code = cpu->table->call(caller, cpu->functions[step->kernel],
                                        &state->args[step->first_arg], (int32_t)step->args);
        if (context->profiling)
            context->seconds[i] += gfi_now() - start;
        if (code != 0)
            return step_failed(context, step, code);
        if (context->observer)
            gfi_notify(context, i, arena_data);
    }
    return GFRT_OK;
}

static gfrt_status cpu_run(gfrt_context *context) {
    const cpu_context *state = context->state;
    cpu_set_t before;
    bool moved = state->stays && sched_getaffinity(0, sizeof before, &before) == 0 &&
                 sched_setaffinity(0, sizeof state->big, &state->big) == 0;
    uint32_t mode = gfi_enter_float_mode();
    gfrt_status status = run_steps(context);
    gfi_leave_float_mode(mode);
    gfi_pool_end(state->pool);
    if (moved)
        sched_setaffinity(0, sizeof before, &before);
    return status;
}

static gfrt_status cpu_observe(gfrt_context *context) {
    (void)context;
    return GFRT_OK;
}

const gfi_device gfi_cpu_device = {
    cpu_load, cpu_unload, cpu_create, cpu_destroy, cpu_write, cpu_read, cpu_run, cpu_observe,
};
