/* Runs a plan on an NVIDIA GPU, through the driver that the board has: libcuda.so.1.
 *
 * Nothing here is newer than CUDA 10.2, the driver of JetPack 4.6. All that is called:
 *
 *     cuInit, cuDeviceGetCount, cuDeviceGet, cuDeviceGetName, cuDeviceGetAttribute (75 and 76),
 *     cuDevicePrimaryCtxRetain, cuDevicePrimaryCtxRelease, cuCtxPushCurrent_v2,
 *     cuCtxPopCurrent_v2, cuModuleLoadData, cuModuleUnload, cuModuleGetFunction, cuMemAlloc_v2,
 *     cuMemFree_v2, cuMemcpyHtoD_v2, cuMemcpyHtoDAsync_v2, cuMemcpyDtoHAsync_v2, cuLaunchKernel,
 *     cuStreamCreate, cuStreamDestroy_v2, cuStreamSynchronize, cuEventCreate, cuEventDestroy_v2,
 *     cuEventRecord, cuEventElapsedTime, cuGetErrorName, cuGetErrorString
 *
 * The bundle's kernels.cubin is machine code for one compute capability; kernels.ptx is compiled
 * by the driver itself where the machine code does not fit. A kernel takes pointers only. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gfrt_internal.h"

typedef int cu_result;
typedef unsigned long long cu_pointer;

#define CAPABILITY_MAJOR 75 /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR */
#define CAPABILITY_MINOR 76
#define STREAM_NON_BLOCKING 1

#define KERNELS_LIMIT ((size_t)256 << 20)

/* name in the library, name here, parameters */
#define DRIVER_FUNCTIONS(F)                                                                        \
    F(cuInit, init, (unsigned flags))                                                              \
    F(cuDeviceGetCount, device_count, (int *count))                                                \
    F(cuDeviceGet, device_get, (int *device, int ordinal))                                         \
    F(cuDeviceGetName, device_name, (char *name, int size, int device))                            \
    F(cuDeviceGetAttribute, device_attribute, (int *value, int attribute, int device))             \
    F(cuDevicePrimaryCtxRetain, retain, (void **context, int device))                              \
    F(cuDevicePrimaryCtxRelease, let_go, (int device))                                             \
    F(cuCtxPushCurrent_v2, push, (void *context))                                                  \
    F(cuCtxPopCurrent_v2, pop, (void **context))                                                   \
    F(cuModuleLoadData, module_load, (void **module, const void *image))                           \
    F(cuModuleUnload, module_unload, (void *module))                                               \
    F(cuModuleGetFunction, module_function, (void **function, void *module, const char *name))     \
    F(cuMemAlloc_v2, allocate, (cu_pointer *memory, size_t size))                                  \
    F(cuMemFree_v2, free_memory, (cu_pointer memory))                                              \
    F(cuMemcpyHtoD_v2, upload, (cu_pointer to, const void *from, size_t size))                     \
    F(cuMemcpyHtoDAsync_v2, upload_async,                                                          \
      (cu_pointer to, const void *from, size_t size, void *stream))                                \
    F(cuMemcpyDtoHAsync_v2, download_async,                                                        \
      (void *to, cu_pointer from, size_t size, void *stream))                                      \
    F(cuLaunchKernel, launch,                                                                      \
      (void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,        \
       unsigned block_y, unsigned block_z, unsigned shared_bytes, void *stream, void **params,     \
       void **extra))                                                                              \
    F(cuStreamCreate, stream_create, (void **stream, unsigned flags))                              \
    F(cuStreamDestroy_v2, stream_destroy, (void *stream))                                          \
    F(cuStreamSynchronize, stream_wait, (void *stream))                                            \
    F(cuEventCreate, event_create, (void **event, unsigned flags))                                 \
    F(cuEventDestroy_v2, event_destroy, (void *event))                                             \
    F(cuEventRecord, event_record, (void *event, void *stream))                                    \
    F(cuEventElapsedTime, event_elapsed, (float *milliseconds, void *start, void *end))            \
    F(cuGetErrorName, error_name, (cu_result result, const char **text))                           \
    F(cuGetErrorString, error_string, (cu_result result, const char **text))

#define MEMBER(symbol, name, parameters) cu_result(*name) parameters;
typedef struct {
    DRIVER_FUNCTIONS(MEMBER)
} cu_driver;

static const struct {
    const char *symbol;
    size_t offset;
} SYMBOLS[] = {
#define SYMBOL(symbol, name, parameters) {#symbol, offsetof(cu_driver, name)},
    DRIVER_FUNCTIONS(SYMBOL)
};

typedef struct {
    void *library;
    cu_driver driver;
    int device;
    void *context; /* the device's primary one, which all models of the process share */
    void *module;
    cu_pointer weights;
    void *functions[]; /* per kernel of the plan */
} cuda_model;

typedef struct {
    void *stream;
    cu_pointer arena;
    cu_pointer *places; /* per tensor of the plan */
    void **params;      /* as the plan's arguments: each points to the place of its tensor */
    void **events;      /* one before each step, one after the last */
    void *staging;      /* for an observer: as large as the largest tensor that a step writes */
} cuda_context;

static gfrt_status driver_failed(const cuda_model *cuda, cu_result result, const char *what) {
    const char *name = NULL, *text = NULL;
    cuda->driver.error_name(result, &name);
    cuda->driver.error_string(result, &text);
    return gfi_fail(GFRT_FAILED, "%s: the CUDA driver says %s (%d: %s)", what,
                    name ? name : "an unknown error", result, text ? text : "?");
}

/* Calls the driver; a failure ends the function around it. */
#define TRY(cuda, what, call)                                                                      \
    do {                                                                                           \
        cu_result result_ = (cuda)->driver.call;                                                   \
        if (result_ != 0)                                                                          \
            return driver_failed(cuda, result_, what);                                             \
    } while (0)

/* ---- models ---- */

static gfrt_status load_driver(cuda_model *cuda) {
    /* The driver's threads may outlive the last model: it stays loaded. */
    cuda->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!cuda->library)
        return gfi_fail(GFRT_UNSUPPORTED,
                        "no CUDA driver (%s): is this a Jetson with its L4T driver (package "
                        "nvidia-l4t-cuda)? In a container, start it with --runtime nvidia",
                        dlerror());
    for (size_t i = 0; i < sizeof SYMBOLS / sizeof SYMBOLS[0]; i++) {
        void *function = dlsym(cuda->library, SYMBOLS[i].symbol);
        if (!function)
            return gfi_fail(GFRT_UNSUPPORTED, "the CUDA driver has no %s: it is older than this "
                                              "runtime supports", SYMBOLS[i].symbol);
        memcpy((char *)&cuda->driver + SYMBOLS[i].offset, &function, sizeof function);
    }
    cu_result result = cuda->driver.init(0);
    int count = 0;
    if (result == 0)
        result = cuda->driver.device_count(&count);
    if (result != 0 || count == 0) {
        if (result != 0)
            driver_failed(cuda, result, "there is a CUDA driver, but");
        return gfi_fail(GFRT_UNSUPPORTED, "no NVIDIA GPU can be used%s%s",
                        result ? ": " : ": the CUDA driver finds none",
                        result ? gfrt_last_error() : "");
    }
    return GFRT_OK;
}

/* The target to compile for, by the compute capability of its GPU. */
static const char *target_for(int major, int minor) {
    switch (10 * major + minor) {
    case 53: return "jetson-nano";
    case 62: return "jetson-tx2";
    case 72: return "jetson-xavier";
    case 87: return "jetson-orin";
    default: return "an older device";
    }
}

static gfrt_status load_image(gfrt_model *model, cuda_model *cuda, const char *file,
                              cu_result *result) {
    void *image = NULL;
    size_t size = 0;
    gfrt_status status = gfi_read_file(model->bundle, file, KERNELS_LIMIT, &image, &size);
    if (status == GFRT_OK) {
        *result = cuda->driver.module_load(&cuda->module, image);
        free(image);
    }
    return status;
}

/* Machine code where it fits, else PTX for the driver to compile. */
static gfrt_status load_kernels(gfrt_model *model, cuda_model *cuda, bool same_capability) {
    cu_result result = -1;
    gfrt_status status = GFRT_OK;
    if (same_capability)
        status = load_image(model, cuda, "kernels.cubin", &result);
    if (status != GFRT_OK)
        return status;
    if (result != 0)
        status = load_image(model, cuda, "kernels.ptx", &result);
    if (status != GFRT_OK)
        return status;
    if (result != 0)
        return driver_failed(cuda, result, "kernels.ptx cannot be loaded");
    return GFRT_OK;
}

static gfrt_status check_device(gfrt_model *model, cuda_model *cuda, bool *same_capability) {
    const uint32_t *want = model->plan.header->capability;
    int major = 0, minor = 0;
    char name[64] = "";
    TRY(cuda, "the GPU", device_get(&cuda->device, 0));
    TRY(cuda, "the GPU", device_name(name, sizeof name, cuda->device));
    TRY(cuda, "the GPU", device_attribute(&major, CAPABILITY_MAJOR, cuda->device));
    TRY(cuda, "the GPU", device_attribute(&minor, CAPABILITY_MINOR, cuda->device));
    if (major < 0 || minor < 0 || (uint32_t)major < want[0] ||
        ((uint32_t)major == want[0] && (uint32_t)minor < want[1]))
        return gfi_fail(GFRT_UNSUPPORTED,
                        "the bundle needs compute capability %u.%u, this GPU (%s) has %d.%d: "
                        "compile with --target %s", want[0], want[1], name, major, minor,
                        target_for(major, minor));
    *same_capability = (uint32_t)major == want[0] && (uint32_t)minor == want[1];
    snprintf(model->name, sizeof model->name, "cuda: %s (%d.%d)", name, major, minor);
    return GFRT_OK;
}

static gfrt_status upload_model(gfrt_model *model, cuda_model *cuda, bool same_capability) {
    const gfi_plan *plan = &model->plan;
    gfrt_status status = load_kernels(model, cuda, same_capability);
    if (status != GFRT_OK)
        return status;
    for (uint32_t i = 0; i < plan->header->kernels; i++) {
        const char *name = gfi_string(plan, plan->kernels[i].name);
        if (cuda->driver.module_function(&cuda->functions[i], cuda->module, name) != 0)
            return gfi_fail(GFRT_DAMAGED, "the GPU code of the bundle has no kernel %s", name);
    }
    size_t size = (size_t)plan->header->weights_bytes;
    if (size > 0) {
        TRY(cuda, "no GPU memory for the weights", allocate(&cuda->weights, size));
        TRY(cuda, "the weights", upload(cuda->weights, model->weights, size));
    }
    return GFRT_OK;
}

static gfrt_status start(gfrt_model *model, cuda_model *cuda) {
    bool same_capability = false;
    gfrt_status status = load_driver(cuda);
    if (status == GFRT_OK)
        status = check_device(model, cuda, &same_capability);
    if (status != GFRT_OK)
        return status;
    TRY(cuda, "the GPU", retain(&cuda->context, cuda->device));
    TRY(cuda, "the GPU", push(cuda->context));
    status = upload_model(model, cuda, same_capability);
    cuda->driver.pop(&(void *){NULL});
    return status;
}

static void cuda_unload(gfrt_model *model) {
    cuda_model *cuda = model->loaded;
    if (!cuda)
        return;
    if (cuda->context) {
        cuda->driver.push(cuda->context);
        if (cuda->weights)
            cuda->driver.free_memory(cuda->weights);
        if (cuda->module)
            cuda->driver.module_unload(cuda->module);
        cuda->driver.pop(&(void *){NULL});
        cuda->driver.let_go(cuda->device);
    }
    if (cuda->library)
        dlclose(cuda->library);
    free(cuda);
    model->loaded = NULL;
}

static gfrt_status cuda_load(gfrt_model *model) {
    uint32_t kernels = model->plan.header->kernels;
    cuda_model *cuda = calloc(1, sizeof *cuda + kernels * sizeof cuda->functions[0]);
    if (!cuda)
        return gfi_fail(GFRT_NO_MEMORY, "no memory for a model");
    model->loaded = cuda;
    gfrt_status status = start(model, cuda);
    if (status != GFRT_OK)
        cuda_unload(model);
    return status;
}

/* ---- contexts ---- */

static void cuda_destroy(gfrt_context *context) {
    const cuda_model *cuda = context->model->loaded;
    cuda_context *state = context->state;
    if (!state)
        return;
    cuda->driver.push(cuda->context);
    for (uint32_t i = 0; state->events && i <= context->model->plan.header->steps; i++) {
        if (state->events[i])
            cuda->driver.event_destroy(state->events[i]);
    }
    if (state->stream)
        cuda->driver.stream_destroy(state->stream);
    if (state->arena)
        cuda->driver.free_memory(state->arena);
    cuda->driver.pop(&(void *){NULL});
    free(state->places);
    free(state->params);
    free(state->events);
    free(state->staging);
    free(state);
    context->state = NULL;
}

static gfrt_status allocate_context(const gfrt_model *model, cuda_context *state) {
    const cuda_model *cuda = model->loaded;
    const gfi_plan *plan = &model->plan;
    const gfi_header *header = plan->header;
    state->places = calloc(header->tensors + 1u, sizeof *state->places);
    state->params = calloc((size_t)header->args + GFI_MAX_ARGS, sizeof *state->params);
    state->events = calloc(header->steps + 1u, sizeof *state->events);
    if (!state->places || !state->params || !state->events)
        return gfi_fail(GFRT_NO_MEMORY, "no memory for a context");
    TRY(cuda, "a stream", stream_create(&state->stream, STREAM_NON_BLOCKING));
    TRY(cuda, "no GPU memory for the activations",
        allocate(&state->arena, (size_t)header->arena_bytes));
    for (uint32_t i = 0; i <= header->steps; i++)
        TRY(cuda, "an event", event_create(&state->events[i], 0));
    for (uint32_t i = 0; i < header->tensors; i++) {
        const gfi_tensor *tensor = &plan->tensors[i];
        state->places[i] =
            (tensor->space == GFI_ARENA ? state->arena : cuda->weights) + tensor->offset;
    }
    for (uint32_t i = 0; i < header->args; i++)
        state->params[i] = &state->places[plan->args[i].tensor];
    /* The driver reads as many as the kernel takes. If a step has fewer, these are null there. */
    for (uint32_t i = 0; i < GFI_MAX_ARGS; i++)
        state->params[header->args + i] = &state->places[header->tensors];
    return GFRT_OK;
}

static gfrt_status cuda_create(gfrt_context *context, uint32_t threads) {
    (void)threads; /* the GPU has its own */
    const cuda_model *cuda = context->model->loaded;
    cuda_context *state = calloc(1, sizeof *state);
    if (!state)
        return gfi_fail(GFRT_NO_MEMORY, "no memory for a context");
    context->state = state;
    cu_result result = cuda->driver.push(cuda->context);
    gfrt_status status = result ? driver_failed(cuda, result, "the GPU")
                                : allocate_context(context->model, state);
    if (result == 0)
        cuda->driver.pop(&(void *){NULL});
    if (status != GFRT_OK)
        cuda_destroy(context);
    return status;
}

static gfrt_status copy_in(const gfrt_context *context, const gfi_tensor *tensor,
                           const void *data) {
    const cuda_model *cuda = context->model->loaded;
    const cuda_context *state = context->state;
    TRY(cuda, "copying to the GPU", upload_async(state->arena + tensor->offset, data,
                                                 gfi_tensor_bytes(tensor), state->stream));
    TRY(cuda, "copying to the GPU", stream_wait(state->stream));
    return GFRT_OK;
}

static gfrt_status copy_out(const gfrt_context *context, const gfi_tensor *tensor, void *data) {
    const cuda_model *cuda = context->model->loaded;
    const cuda_context *state = context->state;
    TRY(cuda, "copying from the GPU", download_async(data, state->arena + tensor->offset,
                                                     gfi_tensor_bytes(tensor), state->stream));
    TRY(cuda, "running on the GPU", stream_wait(state->stream));
    return GFRT_OK;
}

static gfrt_status cuda_write(gfrt_context *context, const gfi_tensor *tensor, const void *data) {
    const cuda_model *cuda = context->model->loaded;
    TRY(cuda, "the GPU", push(cuda->context));
    gfrt_status status = copy_in(context, tensor, data);
    cuda->driver.pop(&(void *){NULL});
    return status;
}

static gfrt_status cuda_read(gfrt_context *context, const gfi_tensor *tensor, void *data) {
    const cuda_model *cuda = context->model->loaded;
    TRY(cuda, "the GPU", push(cuda->context));
    gfrt_status status = copy_out(context, tensor, data);
    cuda->driver.pop(&(void *){NULL});
    return status;
}

static const void *staged_data(gfrt_context *context, const gfi_tensor *tensor) {
    const cuda_context *state = context->state;
    return copy_out(context, tensor, state->staging) == GFRT_OK ? state->staging : NULL;
}

static gfrt_status launch_steps(gfrt_context *context) {
    const gfi_plan *plan = &context->model->plan;
    const cuda_model *cuda = context->model->loaded;
    const cuda_context *state = context->state;
    uint32_t steps = plan->header->steps;
    for (uint32_t i = 0; i < steps; i++) {
        const gfi_step *step = &plan->steps[i];
        if (context->profiling)
            TRY(cuda, "the profile", event_record(state->events[i], state->stream));
        TRY(cuda, gfi_string(plan, step->label),
            launch(cuda->functions[step->kernel], step->grid[0], step->grid[1], step->grid[2],
                   step->block[0], step->block[1], step->block[2], step->shared_bytes,
                   state->stream, &state->params[step->first_arg], NULL));
        if (context->observer)
            gfi_notify(context, i, staged_data);
    }
    if (!context->profiling)
        return GFRT_OK;
    TRY(cuda, "the profile", event_record(state->events[steps], state->stream));
    TRY(cuda, "running on the GPU", stream_wait(state->stream));
    for (uint32_t i = 0; i < steps; i++) {
        float milliseconds = 0;
        TRY(cuda, "the profile",
            event_elapsed(&milliseconds, state->events[i], state->events[i + 1]));
        context->seconds[i] += 1e-3 * (double)milliseconds;
    }
    return GFRT_OK;
}

static gfrt_status cuda_run(gfrt_context *context) {
    const cuda_model *cuda = context->model->loaded;
    TRY(cuda, "the GPU", push(cuda->context));
    gfrt_status status = launch_steps(context);
    cuda->driver.pop(&(void *){NULL});
    return status;
}

static gfrt_status cuda_observe(gfrt_context *context) {
    const gfi_plan *plan = &context->model->plan;
    cuda_context *state = context->state;
    size_t largest = 0;
    for (uint32_t i = 0; i < plan->header->args; i++) {
        size_t bytes = gfi_tensor_bytes(&plan->tensors[plan->args[i].tensor]);
        if (plan->args[i].written && bytes > largest)
            largest = bytes;
    }
    if (!state->staging && !(state->staging = malloc(largest + 1)))
        return gfi_fail(GFRT_NO_MEMORY, "no memory for the %zu bytes of a tensor", largest);
    return GFRT_OK;
}

const gfi_device gfi_cuda_device = {
    cuda_load, cuda_unload, cuda_create, cuda_destroy,
    cuda_write, cuda_read, cuda_run, cuda_observe,
};
