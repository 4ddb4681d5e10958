/* The public API: models, contexts, and what is common to all devices. See gfrt.h. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "gfrt_internal.h"

gfrt_status gfi_fail(gfrt_status status, const char *format, ...) {
    gfi_thread *thread = gfi_this_thread();
    char message[sizeof thread->last_error]; /* an argument may be last_error itself */
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    for (char *at = message; *at; at++) {
        if ((unsigned char)*at < ' ')
            *at = ' '; /* an error is one line, whatever a plan calls its kernels */
    }
    memcpy(thread->last_error, message, sizeof message);
    return status;
}

const char *gfrt_last_error(void) { return gfi_this_thread()->last_error; }

const char *gfrt_version(void) { return "1.0"; }

double gfi_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

#define LEVEL_SHIFT 8 /* as in GFRT_AT_MOST */

/* ---- models ---- */

/* The size of weights.bin. */
static size_t stored_bytes(const gfi_header *header) {
    uint64_t plain = header->weights_bytes - header->packed_bytes;
    return (size_t)(plain + (header->packed_bytes + 1) / 2);
}

/* Multiplies weights by the factors of their groups. */
static void scale_groups(int8_t *weights, const gfi_grouped *grouped) {
    size_t row_bytes = grouped->row_bytes, runs = row_bytes / grouped->run;
    const uint8_t *factors = (const uint8_t *)weights + grouped->factors;
    int8_t *row = weights + grouped->offset, *end = row + grouped->bytes;
    while (row < end) {
        for (uint32_t r = 0; r < grouped->rows; r++, row += row_bytes) {
            if (r > 0 && r % grouped->shared == 0)
                factors += runs;
            for (size_t i = 0; i < row_bytes; i++)
                row[i] = (int8_t)(row[i] * factors[i / grouped->run]);
        }
        factors += runs;
    }
}

/* The weights in their size: from `stored`, whose end holds two integers of four bits a byte. */
static void *expand_weights(const gfi_plan *plan, const uint8_t *stored) {
    const gfi_header *header = plan->header;
    size_t plain = (size_t)(header->weights_bytes - header->packed_bytes);
    int8_t *weights = mmap(NULL, (size_t)header->weights_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (weights == MAP_FAILED)
        return NULL;
    madvise(weights, (size_t)header->weights_bytes, MADV_HUGEPAGE);
    memcpy(weights, stored, plain);
    for (size_t i = 0; i < header->packed_bytes; i++) {
        int half = stored[plain + i / 2] >> (i % 2 * 4) & 15;
        weights[plain + i] = (int8_t)((half ^ 8) - 8); /* bit 3 is the sign */
    }
    for (uint32_t i = 0; i < header->grouped; i++)
        scale_groups(weights, &plan->grouped[i]);
    mprotect(weights, (size_t)header->weights_bytes, PROT_READ);
    return weights;
}

/* Maps weights.bin, shared with every process that runs this bundle; weights of four bits are
 * expanded, each process its own. */
static gfrt_status map_weights(gfrt_model *model, uint32_t flags) {
    const gfi_header *header = model->plan.header;
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/weights.bin", model->bundle);
    if (length < 0 || (size_t)length >= sizeof path)
        return gfi_fail(GFRT_BAD_ARGUMENT, "the path of the bundle is too long");
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* does not wait for a pipe */
    if (file < 0)
        return gfi_fail(GFRT_NOT_FOUND, "%s: %s; copy the bundle again", path, strerror(errno));
    size_t size = stored_bytes(header);
    long long found = lseek(file, 0, SEEK_END);
    void *stored = NULL;
    gfrt_status result = GFRT_OK;
    if (found < 0) {
        result = gfi_fail(GFRT_NOT_FOUND, "%s: %s", path, strerror(errno));
    } else if ((uint64_t)found != size) {
        result = gfi_fail(GFRT_DAMAGED, "%s has %lld bytes instead of %zu; copy the bundle again",
                          path, found, size);
    } else if (size > 0) {
        stored = mmap(NULL, size, PROT_READ, MAP_SHARED, file, 0);
        if (stored == MAP_FAILED) {
            stored = NULL;
            result = gfi_fail(GFRT_NO_MEMORY, "%s cannot be mapped: %s", path, strerror(errno));
        } else {
            /* What is not in memory yet is read in huge pages, where the file system has them. */
            madvise(stored, size, MADV_HUGEPAGE);
        }
    }
    close(file);
    if (result == GFRT_OK && (flags & GFRT_VERIFY)) {
        uint8_t hash[GFI_HASH_BYTES];
        gfi_sha256(stored, size, hash);
        if (memcmp(hash, header->weights_hash, sizeof hash) != 0)
            result = gfi_fail(GFRT_DAMAGED, "%s was changed: its SHA-256 differs; copy the bundle "
                                            "again", path);
    }
    if (result == GFRT_OK && header->packed_bytes > 0) {
        model->weights = expand_weights(&model->plan, stored);
        if (!model->weights)
            result = gfi_fail(GFRT_NO_MEMORY, "no memory for the %llu bytes of the weights",
                              (unsigned long long)header->weights_bytes);
    } else if (result == GFRT_OK) {
        model->weights = stored;
        stored = NULL;
    }
    if (stored)
        munmap(stored, size);
    return result;
}

static gfrt_status load_model(gfrt_model *model, const char *bundle, uint32_t flags) {
    model->bundle = strdup(bundle);
    if (!model->bundle)
        return gfi_fail(GFRT_NO_MEMORY, "no memory for a model");
    uint32_t at_most = flags >> LEVEL_SHIFT;
    uint32_t level = at_most ? at_most - 1 : GFI_MAX_LEVEL;
    gfrt_status status = gfi_plan_read(bundle, level, &model->plan);
    if (status == GFRT_OK)
        status = gfi_check_cpu(&model->plan);
    if (status == GFRT_OK)
        status = map_weights(model, flags);
    if (status != GFRT_OK)
        return status;
    const gfi_device *device = model->plan.header->device == GFI_CUDA ? gfi_cuda : &gfi_cpu_device;
    if (!device)
        return gfi_fail(GFRT_UNSUPPORTED,
                        "the bundle is for an NVIDIA GPU, and this library was linked without CUDA:"
                        " load %s of the bundle itself", model->plan.header->library);
    status = device->load(model);
    if (status == GFRT_OK)
        model->device = device;
    return status;
}

static void release_model(gfrt_model *model) {
    if (atomic_fetch_sub(&model->users, 1) != 1)
        return;
    if (model->device)
        model->device->unload(model);
    if (model->weights)
        munmap((void *)model->weights, (size_t)model->plan.header->weights_bytes);
    gfi_plan_free(&model->plan);
    free(model->bundle);
    free(model);
}

gfrt_status gfrt_open(const char *bundle, uint32_t flags, gfrt_model **result) {
    if (!result)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_open: model is null");
    *result = NULL;
    if (!bundle)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_open: bundle is null");
    if ((flags & ~(uint32_t)GFRT_VERIFY) > GFRT_AT_MOST(GFI_MAX_LEVEL) ||
        (flags & (GFRT_AT_MOST(0) - 1) & ~(uint32_t)GFRT_VERIFY))
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_open: unknown flags 0x%x", (unsigned)flags);
    gfrt_model *model = calloc(1, sizeof *model);
    if (!model)
        return gfi_fail(GFRT_NO_MEMORY, "no memory for a model");
    atomic_init(&model->users, 1);
    gfi_thread *thread = gfi_this_thread();
    char error[sizeof thread->last_error];
    memcpy(error, thread->last_error, sizeof error);
    gfrt_status status = load_model(model, bundle, flags);
    if (status == GFRT_OK) {
        *result = model;
        /* There is no plan for a better CPU, or this is none: nothing went wrong. */
        memcpy(thread->last_error, error, sizeof error);
    } else {
        release_model(model);
    }
    return status;
}

void gfrt_close(gfrt_model *model) {
    if (model)
        release_model(model);
}

const char *gfrt_device(const gfrt_model *model) { return model ? model->name : ""; }

uint32_t gfrt_level(const gfrt_model *model) { return model ? model->plan.level : 0; }

size_t gfrt_input_count(const gfrt_model *model) { return model ? model->plan.header->inputs : 0; }

size_t gfrt_output_count(const gfrt_model *model) {
    return model ? model->plan.header->outputs : 0;
}

size_t gfrt_step_count(const gfrt_model *model) { return model ? model->plan.header->steps : 0; }

void gfi_tensor_info(const gfrt_model *model, const gfi_tensor *tensor, const char *name,
                     gfrt_tensor_info *info) {
    memset(info, 0, sizeof *info);
    info->name = name ? name : gfi_string(&model->plan, tensor->name);
    info->dtype = (gfrt_dtype)tensor->dtype;
    info->ndim = (int32_t)tensor->ndim;
    memcpy(info->shape, tensor->shape, tensor->ndim * sizeof tensor->shape[0]);
    info->size_bytes = gfi_tensor_bytes(tensor);
    info->scale = tensor->scale;
    info->zero_point = tensor->zero_point;
    info->storage_offset = tensor->storage_offset;
}

static const gfi_tensor *io_tensor(const gfrt_model *model, const gfi_io *io) {
    return &model->plan.tensors[io->tensor];
}

static gfrt_status io_info(const gfrt_model *model, const gfi_io *ios, size_t count, size_t index,
                           const char *what, gfrt_tensor_info *info) {
    if (!info)
        return gfi_fail(GFRT_BAD_ARGUMENT, "info is null");
    if (index >= count)
        return gfi_fail(GFRT_BAD_ARGUMENT, "the model has %zu %ss: there is no %s %zu", count,
                        what, what, index);
    const gfi_io *io = &ios[index];
    gfi_tensor_info(model, io_tensor(model, io), gfi_string(&model->plan, io->name), info);
    return GFRT_OK;
}

gfrt_status gfrt_input_info(const gfrt_model *model, size_t index, gfrt_tensor_info *info) {
    if (!model)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_input_info: model is null");
    return io_info(model, model->plan.inputs, model->plan.header->inputs, index, "input", info);
}

gfrt_status gfrt_output_info(const gfrt_model *model, size_t index, gfrt_tensor_info *info) {
    if (!model)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_output_info: model is null");
    return io_info(model, model->plan.outputs, model->plan.header->outputs, index, "output", info);
}

static void normalize(const gfi_io *io, size_t images, size_t area, const uint8_t *pixels,
                      float *input) {
    for (size_t c = 0; c < 3; c++) {
        float value[256]; /* there are but 256: the divisions are done once */
        for (int x = 0; x < 256; x++)
            value[x] = ((float)x / 255.0f - io->mean[c]) / io->std[c];
        for (size_t n = 0; n < images; n++) {
            const uint8_t *from = pixels + n * 3 * area + c;
            float *to = input + (n * 3 + c) * area;
            for (size_t i = 0; i < area; i++)
                to[i] = value[from[3 * i]];
        }
    }
}

gfrt_status gfrt_normalize_u8(const gfrt_model *model, size_t index, const uint8_t *pixels,
                              size_t pixels_size, float *input, size_t input_size) {
    if (!model || !pixels || !input)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_normalize_u8: a pointer is null");
    if (index >= model->plan.header->inputs || !model->plan.inputs[index].normalized)
        return gfi_fail(GFRT_BAD_ARGUMENT, "input %zu of the model is no RGB image", index);
    const gfi_io *io = &model->plan.inputs[index];
    const gfi_tensor *tensor = io_tensor(model, io);
    size_t bytes = gfi_tensor_bytes(tensor);
    if (pixels_size != bytes / sizeof(float) || input_size != bytes)
        return gfi_fail(GFRT_BAD_ARGUMENT,
                        "gfrt_normalize_u8: %lld x %lld pixels (height x width) have %zu bytes, the"
                        " input %zu; got %zu and %zu", (long long)tensor->shape[2],
                        (long long)tensor->shape[3], bytes / sizeof(float), bytes, pixels_size,
                        input_size);
    uint32_t mode = gfi_enter_float_mode();
    normalize(io, (size_t)tensor->shape[0], (size_t)tensor->shape[2] * (size_t)tensor->shape[3],
              pixels, input);
    gfi_leave_float_mode(mode);
    return GFRT_OK;
}

/* ---- contexts ---- */

gfrt_status gfrt_context_create(gfrt_model *model, uint32_t threads, gfrt_context **result) {
    if (!result)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_context_create: context is null");
    *result = NULL;
    if (!model)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_context_create: model is null");
    gfrt_context *context = calloc(1, sizeof *context);
    double *seconds = calloc(model->plan.header->steps + 1u, sizeof *seconds);
    gfrt_status status = GFRT_OK;
    if (!context || !seconds) {
        status = gfi_fail(GFRT_NO_MEMORY, "no memory for a context");
    } else {
        context->model = model;
        context->seconds = seconds;
        atomic_flag_clear(&context->busy);
        status = model->device->create(context, threads);
    }
    if (status != GFRT_OK) {
        free(seconds);
        free(context);
        return status;
    }
    atomic_fetch_add(&model->users, 1);
    *result = context;
    return GFRT_OK;
}

void gfrt_context_destroy(gfrt_context *context) {
    if (!context)
        return;
    context->model->device->destroy(context);
    release_model(context->model);
    free(context->seconds);
    free(context);
}

static gfrt_status check_buffers(const gfrt_model *model, const gfi_io *ios, size_t count,
                                 const void *const *buffers, const size_t *sizes,
                                 const char *what) {
    for (size_t i = 0; i < count; i++) {
        size_t want = gfi_tensor_bytes(io_tensor(model, &ios[i]));
        if (!buffers[i])
            return gfi_fail(GFRT_BAD_ARGUMENT, "%s %zu is null", what, i);
        if (sizes[i] != want)
            return gfi_fail(GFRT_BAD_ARGUMENT, "%s %zu (%s) has %zu bytes, got %zu", what, i,
                            gfi_string(&model->plan, ios[i].name), want, sizes[i]);
    }
    return GFRT_OK;
}

static gfrt_status run(gfrt_context *context, const void *const inputs[],
                       const size_t input_sizes[], void *const outputs[],
                       const size_t output_sizes[]) {
    const gfrt_model *model = context->model;
    const gfi_plan *plan = &model->plan;
    size_t input_count = plan->header->inputs, output_count = plan->header->outputs;
    gfrt_status status =
        check_buffers(model, plan->inputs, input_count, inputs, input_sizes, "input");
    if (status == GFRT_OK)
        status = check_buffers(model, plan->outputs, output_count, (const void *const *)outputs,
                               output_sizes, "output");
    for (size_t i = 0; i < input_count && status == GFRT_OK; i++)
        status = model->device->write(context, io_tensor(model, &plan->inputs[i]), inputs[i]);
    if (status == GFRT_OK)
        status = model->device->run(context);
    for (size_t i = 0; i < output_count && status == GFRT_OK; i++)
        status = model->device->read(context, io_tensor(model, &plan->outputs[i]), outputs[i]);
    if (status == GFRT_OK && context->profiling)
        context->calls++;
    return status;
}

gfrt_status gfrt_run(gfrt_context *context, const void *const inputs[], const size_t input_sizes[],
                     void *const outputs[], const size_t output_sizes[]) {
    if (!context || !inputs || !input_sizes || !outputs || !output_sizes)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_run: a pointer is null");
    if (atomic_flag_test_and_set(&context->busy))
        return gfi_fail(GFRT_BUSY, "another thread is running this context: "
                                   "create one context per thread");
    gfrt_status status = run(context, inputs, input_sizes, outputs, output_sizes);
    atomic_flag_clear(&context->busy);
    return status;
}

gfrt_status gfrt_set_observer(gfrt_context *context, gfrt_observer observer, void *user) {
    if (!context)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_set_observer: context is null");
    gfrt_status status = observer ? context->model->device->observe(context) : GFRT_OK;
    if (status == GFRT_OK) {
        context->observer = observer;
        context->user = user;
    }
    return status;
}

void gfi_notify(gfrt_context *context, size_t step,
                const void *(*data)(gfrt_context *context, const gfi_tensor *tensor)) {
    const gfi_plan *plan = &context->model->plan;
    const gfi_step *record = &plan->steps[step];
    /* It may take itself away. */
    for (uint32_t i = 0; i < record->args && context->observer; i++) {
        const gfi_arg *arg = &plan->args[record->first_arg + i];
        if (!arg->written)
            continue;
        gfrt_tensor_info info;
        const gfi_tensor *tensor = &plan->tensors[arg->tensor];
        gfi_tensor_info(context->model, tensor, NULL, &info);
        const void *values = data(context, tensor);
        if (values)
            context->observer(context->user, step, gfi_string(plan, record->label), &info, values);
    }
}

gfrt_status gfrt_profile_enable(gfrt_context *context, int enable) {
    if (!context)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_profile_enable: context is null");
    context->profiling = enable != 0;
    if (enable) {
        context->calls = 0;
        memset(context->seconds, 0, context->model->plan.header->steps * sizeof(double));
    }
    return GFRT_OK;
}

gfrt_status gfrt_profile_get(const gfrt_context *context, size_t step,
                             gfrt_step_profile *profile) {
    if (!context || !profile)
        return gfi_fail(GFRT_BAD_ARGUMENT, "gfrt_profile_get: a pointer is null");
    const gfi_plan *plan = &context->model->plan;
    if (step >= plan->header->steps)
        return gfi_fail(GFRT_BAD_ARGUMENT, "the model has %u steps: there is no step %zu",
                        plan->header->steps, step);
    const gfi_step *record = &plan->steps[step];
    profile->kernel = gfi_string(plan, plan->kernels[record->kernel].name);
    profile->label = gfi_string(plan, record->label);
    profile->calls = context->calls;
    profile->seconds = context->seconds[step];
    return GFRT_OK;
}
