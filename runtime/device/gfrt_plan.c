/* Reads plan.bin. It may come from anywhere: nothing in it is used before it was checked. */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "gfrt_internal.h"

#define PLAN_LIMIT ((size_t)64 << 20)
#define COUNT_LIMIT ((uint32_t)1 << 20)
#define BYTES_LIMIT ((uint64_t)1 << 40) /* no tensor and no space is larger: sums cannot wrap */

gfrt_status gfi_read_file(const char *bundle, const char *name, size_t limit, void **data,
                          size_t *size) {
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/%s", bundle, name);
    if (length < 0 || (size_t)length >= sizeof path)
        return gfi_fail(GFRT_BAD_ARGUMENT, "the path of the bundle is too long");
    /* A pipe nobody writes to is opened at once, too, and then has no end to go to. */
    int handle = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (handle < 0)
        return gfi_fail(GFRT_NOT_FOUND, "%s: %s; is this a bundle?", path, strerror(errno));
    FILE *file = fdopen(handle, "rb");
    if (!file) {
        close(handle);
        return gfi_fail(GFRT_NO_MEMORY, "no memory to read %s", path);
    }
    gfrt_status status = GFRT_OK;
    char *bytes = NULL;
    long end = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    if (end < 0 || fseek(file, 0, SEEK_SET) != 0) {
        status = gfi_fail(GFRT_NOT_FOUND, "%s cannot be read: %s", path, strerror(errno));
    } else if ((unsigned long)end > limit) {
        status = gfi_fail(GFRT_DAMAGED, "%s is damaged: %ld bytes are too many", path, end);
    } else if (!(bytes = malloc((size_t)end + 1))) {
        status = gfi_fail(GFRT_NO_MEMORY, "no memory for the %ld bytes of %s", end, path);
    } else if (fread(bytes, 1, (size_t)end, file) != (size_t)end) {
        status = gfi_fail(GFRT_NOT_FOUND, "%s cannot be read", path);
        free(bytes);
    } else {
        bytes[end] = 0;
        *data = bytes;
        *size = (size_t)end;
    }
    fclose(file);
    return status;
}

#define DAMAGED(...) gfi_fail(GFRT_DAMAGED, "plan.bin is damaged: " __VA_ARGS__)

/* Whether a field of `size` characters holds a plain file name, or hexadecimal digits. */
static bool is_name(const char *text, size_t size) {
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+.";
    return text[0] && text[0] != '.' && memchr(text, 0, size) && text[strspn(text, allowed)] == 0;
}

static size_t item_bytes(uint32_t dtype) {
    static const uint8_t bytes[] = {
        [GFRT_FLOAT32] = 4, [GFRT_INT8] = 1,  [GFRT_UINT8] = 1, [GFRT_INT32] = 4,
        [GFRT_UINT16] = 2,  [GFRT_INT64] = 8, [GFRT_BOOL] = 1,
        [GFRT_INT16] = 2,   [GFRT_FLOAT16] = 2,
    };
    return dtype < sizeof bytes ? bytes[dtype] : 0;
}

size_t gfi_tensor_bytes(const gfi_tensor *tensor) {
    size_t bytes = item_bytes(tensor->dtype);
    for (uint32_t i = 0; i < tensor->ndim; i++)
        bytes *= (size_t)tensor->shape[i];
    return bytes;
}

static gfrt_status check_tensor(const gfi_header *header, const gfi_tensor *tensor, uint32_t i) {
    if (tensor->name >= header->string_bytes)
        return DAMAGED("the name of tensor %u", i);
    if (item_bytes(tensor->dtype) == 0 || tensor->ndim > GFRT_MAX_DIMS ||
        tensor->space > GFI_WEIGHTS)
        return DAMAGED("the type of tensor %u", i);
    uint64_t bytes = item_bytes(tensor->dtype);
    for (uint32_t d = 0; d < tensor->ndim; d++) {
        if (tensor->shape[d] < 1 || (uint64_t)tensor->shape[d] > BYTES_LIMIT / bytes)
            return DAMAGED("the shape of tensor %u", i);
        bytes *= (uint64_t)tensor->shape[d];
    }
    uint64_t space = tensor->space == GFI_ARENA ? header->arena_bytes : header->weights_bytes;
    if (tensor->offset % GFI_ALIGNMENT != 0 || tensor->offset > space ||
        bytes > space - tensor->offset)
        return DAMAGED("the place of tensor %u", i);
    if (!isfinite(tensor->scale) || tensor->scale < 0)
        return DAMAGED("the scale of tensor %u", i);
    return GFRT_OK;
}

/* The limits of a launch that every GPU has (CUDA C++ programming guide, compute capabilities). */
static bool is_launch(const gfi_step *step) {
    static const uint32_t grid_limit[3] = {2147483647, 65535, 65535};
    static const uint32_t block_limit[3] = {1024, 1024, 64};
    for (int i = 0; i < 3; i++) {
        if (step->grid[i] < 1 || step->grid[i] > grid_limit[i] || step->block[i] < 1 ||
            step->block[i] > block_limit[i])
            return false;
    }
    return (uint64_t)step->block[0] * step->block[1] * step->block[2] <= 1024 &&
           step->shared_bytes <= 48 << 10;
}

static gfrt_status check_step(const gfi_plan *plan, uint32_t i) {
    const gfi_header *header = plan->header;
    const gfi_step *step = &plan->steps[i];
    if (step->kernel >= header->kernels || step->label >= header->string_bytes)
        return DAMAGED("the kernel of step %u", i);
    if (step->args < 1 || step->args > GFI_MAX_ARGS || step->first_arg > header->args ||
        step->args > header->args - step->first_arg)
        return DAMAGED("the arguments of step %u", i);
    for (uint32_t k = 0; k < step->args; k++) {
        const gfi_arg *arg = &plan->args[step->first_arg + k];
        if (arg->tensor >= header->tensors || arg->written > 1)
            return DAMAGED("argument %u of step %u", k, i);
        if (arg->written && plan->tensors[arg->tensor].space != GFI_ARENA)
            return DAMAGED("step %u writes to a weight", i);
    }
    if (header->device == GFI_CUDA && !is_launch(step))
        return DAMAGED("the launch of step %u", i);
    return GFRT_OK;
}

static gfrt_status check_io(const gfi_plan *plan, const gfi_io *io, const char *what, uint32_t i) {
    if (io->name >= plan->header->string_bytes || io->tensor >= plan->header->tensors ||
        io->normalized > 1)
        return DAMAGED("%s %u", what, i);
    const gfi_tensor *tensor = &plan->tensors[io->tensor];
    if (tensor->space != GFI_ARENA)
        return DAMAGED("%s %u is a weight", what, i);
    if (io->normalized) {
        if (tensor->dtype != GFRT_FLOAT32 || tensor->ndim != 4 || tensor->shape[1] != 3)
            return DAMAGED("%s %u is no RGB image", what, i);
        for (int c = 0; c < 3; c++) {
            if (!isfinite(io->mean[c]) || !isfinite(io->std[c]) || io->std[c] <= 0)
                return DAMAGED("the normalization of %s %u", what, i);
        }
    }
    return GFRT_OK;
}

static gfrt_status check_grouped(const gfi_header *header, const gfi_grouped *grouped,
                                 uint32_t i) {
    uint64_t plain = header->weights_bytes - header->packed_bytes;
    if (grouped->offset < plain || grouped->offset > header->weights_bytes ||
        grouped->bytes > header->weights_bytes - grouped->offset)
        return DAMAGED("the place of grouped weights %u", i);
    if (grouped->run < 1 || grouped->row_bytes < 1 || grouped->row_bytes % grouped->run != 0 ||
        grouped->rows < 1 || grouped->shared < 1 ||
        grouped->bytes % ((uint64_t)grouped->row_bytes * grouped->rows) != 0)
        return DAMAGED("the shape of grouped weights %u", i);
    uint64_t panels = grouped->bytes / ((uint64_t)grouped->row_bytes * grouped->rows);
    uint64_t groups = ((uint64_t)grouped->rows + grouped->shared - 1) / grouped->shared;
    /* No more than there are weights, which cannot overflow. */
    uint64_t factors = panels * groups * (grouped->row_bytes / grouped->run);
    if (grouped->factors > plain || factors > plain - grouped->factors)
        return DAMAGED("the factors of grouped weights %u", i);
    return GFRT_OK;
}

static gfrt_status check_header(const gfi_header *header, size_t size) {
    if (size < sizeof *header || memcmp(header->magic, "GFRTPLAN", 8) != 0)
        return DAMAGED("it is not a plan");
    if (header->format > GFI_PLAN_FORMAT)
        return gfi_fail(GFRT_TOO_NEW,
                        "the bundle was written by a newer gfcompile (plan format %u, this runtime "
                        "reads up to %u): use the library and gfrt.py of the bundle itself",
                        header->format, GFI_PLAN_FORMAT);
    if (header->format == 1)
        return gfi_fail(GFRT_UNSUPPORTED,
                        "the bundle was written by an older gfcompile (plan format 1, this runtime "
                        "reads %u): use the library and gfrt.py of the bundle itself",
                        GFI_PLAN_FORMAT);
    if (header->format < 1 || header->header_bytes != sizeof *header)
        return DAMAGED("its header");
    if (header->plan_bytes != size)
        return DAMAGED("%zu bytes instead of %llu; copy the bundle again", size,
                       (unsigned long long)header->plan_bytes);
    uint8_t hash[GFI_HASH_BYTES];
    size_t from = offsetof(gfi_header, hash) + GFI_HASH_BYTES;
    gfi_sha256((const char *)header + from, size - from, hash);
    if (memcmp(hash, header->hash, sizeof hash) != 0)
        return DAMAGED("its hash differs; copy the bundle again");
    if (header->device > GFI_CUDA || header->arch > GFI_AARCH64 ||
        header->arena_bytes > BYTES_LIMIT || header->weights_bytes > BYTES_LIMIT ||
        header->workspace_bytes > BYTES_LIMIT)
        return DAMAGED("its header");
    if (header->packed_bytes > header->weights_bytes)
        return DAMAGED("its packed weights");
    if (!is_name(header->library_id, sizeof header->library_id) ||
        !is_name(header->library, sizeof header->library))
        return DAMAGED("the name of its library");
    if (header->tensors > COUNT_LIMIT || header->steps > COUNT_LIMIT ||
        header->args > COUNT_LIMIT || header->kernels > COUNT_LIMIT || header->inputs < 1 ||
        header->inputs > COUNT_LIMIT || header->outputs < 1 || header->outputs > COUNT_LIMIT || header->grouped > COUNT_LIMIT ||
        header->string_bytes < 1 || header->cpu_features >= header->string_bytes)
        return DAMAGED("its counts");
    return GFRT_OK;
}

static gfrt_status check_plan(gfi_plan *plan, size_t size) {
    const gfi_header *header = plan->header;
    gfrt_status status = check_header(header, size);
    if (status)
        return status;
    uint64_t tensors_at = sizeof *header;
    uint64_t steps_at = tensors_at + (uint64_t)header->tensors * sizeof(gfi_tensor);
    uint64_t args_at = steps_at + (uint64_t)header->steps * sizeof(gfi_step);
    uint64_t kernels_at = args_at + (uint64_t)header->args * sizeof(gfi_arg);
    uint64_t inputs_at = kernels_at + (uint64_t)header->kernels * sizeof(gfi_kernel);
    uint64_t outputs_at = inputs_at + (uint64_t)header->inputs * sizeof(gfi_io);
    uint64_t grouped_at = outputs_at + (uint64_t)header->outputs * sizeof(gfi_io);
    uint64_t strings_at = grouped_at + (uint64_t)header->grouped * sizeof(gfi_grouped);
    if (strings_at + header->string_bytes != size)
        return DAMAGED("its sections");
    const char *data = plan->data;
    if (data[size - 1] != 0) /* so every string that starts in the pool ends in it */
        return DAMAGED("its strings");
    plan->tensors = (const gfi_tensor *)(data + tensors_at);
    plan->steps = (const gfi_step *)(data + steps_at);
    plan->args = (const gfi_arg *)(data + args_at);
    plan->kernels = (const gfi_kernel *)(data + kernels_at);
    plan->inputs = (const gfi_io *)(data + inputs_at);
    plan->outputs = (const gfi_io *)(data + outputs_at);
    plan->grouped = (const gfi_grouped *)(data + grouped_at);
    plan->strings = data + strings_at;

    for (uint32_t i = 0; i < header->tensors && !status; i++)
        status = check_tensor(header, &plan->tensors[i], i);
    for (uint32_t i = 0; i < header->kernels && !status; i++) {
        if (plan->kernels[i].name >= header->string_bytes)
            status = DAMAGED("the name of kernel %u", i);
    }
    for (uint32_t i = 0; i < header->steps && !status; i++)
        status = check_step(plan, i);
    for (uint32_t i = 0; i < header->inputs && !status; i++)
        status = check_io(plan, &plan->inputs[i], "input", i);
    for (uint32_t i = 0; i < header->outputs && !status; i++)
        status = check_io(plan, &plan->outputs[i], "output", i);
    uint64_t grouped_bytes = 0;
    for (uint32_t i = 0; i < header->grouped && !status; i++) {
        status = check_grouped(header, &plan->grouped[i], i);
        grouped_bytes += plan->grouped[i].bytes;
    }
    /* Each weight has one factor: a million records of the same ones would take hours. */
    if (!status && grouped_bytes > header->packed_bytes)
        status = DAMAGED("its grouped weights");
    return status;
}

static gfrt_status read_plan(const char *bundle, const char *name, gfi_plan *plan) {
    size_t size = 0;
    memset(plan, 0, sizeof *plan);
    gfrt_status status = gfi_read_file(bundle, name, PLAN_LIMIT, &plan->data, &size);
    if (status)
        return status;
    plan->header = plan->data;
    status = check_plan(plan, size);
    if (status == GFRT_DAMAGED) /* whose message says plan.bin */
        gfi_fail(status, "%s%s", name, gfrt_last_error() + strlen("plan.bin"));
    if (status)
        gfi_plan_free(plan);
    return status;
}

/* Whether both plans are of one bundle: the same library, weights, inputs and outputs. */
static bool belong_together(const gfi_plan *a, const gfi_plan *b) {
    return a->header->arch == b->header->arch && a->header->device == b->header->device &&
           strcmp(a->header->library_id, b->header->library_id) == 0 &&
           a->header->weights_bytes == b->header->weights_bytes &&
           a->header->packed_bytes == b->header->packed_bytes &&
           memcmp(a->header->weights_hash, b->header->weights_hash, GFI_HASH_BYTES) == 0 &&
           a->header->inputs == b->header->inputs && a->header->outputs == b->header->outputs;
}

gfrt_status gfi_plan_read(const char *bundle, uint32_t level, gfi_plan *plan) {
    gfrt_status status = read_plan(bundle, "plan.bin", plan);
    for (uint32_t i = 1; i <= level && i <= GFI_MAX_LEVEL && status == GFRT_OK; i++) {
        char name[16];
        gfi_plan better;
        snprintf(name, sizeof name, "plan-%u.bin", (unsigned)i);
        status = read_plan(bundle, name, &better);
        if (status == GFRT_NOT_FOUND)
            return GFRT_OK; /* there are no more */
        if (status != GFRT_OK)
            break;
        if (!belong_together(plan, &better)) {
            status = gfi_fail(GFRT_DAMAGED, "plan.bin and %s do not belong together: copy the "
                                            "bundle again", name);
            gfi_plan_free(&better);
        } else if (gfi_check_cpu(&better) != GFRT_OK) {
            gfi_plan_free(&better); /* a better CPU's: a level above may still be this one's */
        } else {
            gfi_plan_free(plan);
            *plan = better;
            plan->level = i;
        }
    }
    if (status != GFRT_OK)
        gfi_plan_free(plan);
    return status;
}

void gfi_plan_free(gfi_plan *plan) {
    free(plan->data);
    memset(plan, 0, sizeof *plan);
}

const char *gfi_string(const gfi_plan *plan, uint32_t offset) { return plan->strings + offset; }
