/* gfbench: runs and times a bundle through its own library, as any program on the device would.
 *
 * It is linked against libc, libm and libdl alone and loads whatever library the bundle has. With
 * GFBENCH_STATIC it loads nothing: runtime and kernels of one bundle are linked in. It ends with 0,
 * with 1 if it could not be done, with 2 if it was asked for wrongly, and with 3 if this device
 * cannot run the bundle. */
#ifndef GFBENCH_STATIC
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>
#endif
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "gfbench.h"
#include "gfrt_internal.h" /* the header of plan.bin names the library */

static const char USAGE[] =
    "usage: gfbench BUNDLE [options]\n"
    "  --input FILE      raw inputs, one inference after the other (default: a fixed noise)\n"
    "  --image-u8 FILE   the same as 8-bit RGB pixels, height x width x 3, image after image\n"
    "  --output FILE     write the raw outputs of each inference\n"
    "  --trace FILE      write each tensor that a step writes (see runtime/trace.py)\n"
    "  --runs N          time N runs (default 10; 0 with --output or --trace)\n"
    "  --seconds N       and go on for N seconds at least\n"
    "  --single-stream   as MLPerf has it: 1024 runs and 60 seconds at least; p90 is the result\n"
    "  --warmup N        after N runs (default: until times are stable, 10 seconds at most)\n"
    "  --level N         of a library for several kinds of CPU: at most the kernels of number N\n"
    "  --kernels-only    leave the copies of input and output out of the time\n"
    "  --threads N       default 1; 0 is one for each big CPU\n"
    "  --pin big|LIST    run on the big CPUs, or on those listed, such as 0,2-3\n"
    "  --profile         then time each step, too\n"
    "  --verify          check the SHA-256 of the weights\n"
    "  --json            print JSON, with every sample\n";

#define SINGLE_STREAM_RUNS 1024
#define SINGLE_STREAM_SECONDS 60

library rt;

typedef struct {
    FILE *file;
    uint32_t inference;
} trace;

void die(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("gfbench: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(code);
}

void check(gfrt_status status) {
    if (status != GFRT_OK)
        die(status == GFRT_UNSUPPORTED ? 3 : 1, "%s", rt.last_error());
}

void *get_memory(size_t size) {
    void *memory = calloc(size + 1, 1);
    if (!memory)
        die(1, "no memory for %zu bytes", size);
    return memory;
}

static FILE *open_file(const char *path, const char *mode) {
    FILE *file = fopen(path, mode);
    if (!file)
        die(1, "%s cannot be %s", path, mode[0] == 'r' ? "read" : "written");
    return file;
}

static void write_all(FILE *file, const void *data, size_t size) {
    if (size > 0 && fwrite(data, 1, size, file) != size)
        die(1, "a file cannot be written: is the disk full?");
}

static void close_written(FILE *file) {
    if (fclose(file) != 0)
        die(1, "a file cannot be written: is the disk full?");
}

static long number(const char *option, const char *text) {
    char *end = NULL;
    long value = text ? strtol(text, &end, 10) : -1;
    if (!text || *text == 0 || *end != 0 || value < 0 || value > 1000000)
        die(2, "%s takes a number from 0 to 1000000", option);
    return value;
}

static options parse(char **argv) {
    options o = {.runs = -1, .warmup = UNTIL_STABLE, .threads = 1, .level = -1};
    for (char **arg = argv + 1; *arg; arg++) {
        const char *name = *arg;
        const struct {
            const char *name;
            const char **text;
            long *number;
        } valued[] = {
            {"--input", &o.input, NULL},     {"--image-u8", &o.image, NULL},
            {"--output", &o.output, NULL},   {"--trace", &o.trace, NULL},
            {"--runs", NULL, &o.runs},       {"--warmup", NULL, &o.warmup},
            {"--threads", NULL, &o.threads}, {"--seconds", NULL, &o.seconds},
            {"--level", NULL, &o.level},     {"--pin", &o.pin, NULL},
        };
        bool found = true;
        if (strcmp(name, "--profile") == 0)
            o.profile = true;
        else if (strcmp(name, "--json") == 0)
            o.json = true;
        else if (strcmp(name, "--kernels-only") == 0)
            o.kernels_only = true;
        else if (strcmp(name, "--single-stream") == 0)
            o.single_stream = true;
        else if (strcmp(name, "--verify") == 0)
            o.flags |= GFRT_VERIFY;
        else if (name[0] != '-' && !o.bundle)
            o.bundle = name;
        else
            found = false;
        for (size_t i = 0; i < sizeof valued / sizeof valued[0] && !found; i++) {
            if (strcmp(name, valued[i].name) != 0)
                continue;
            found = true;
            const char *value = *++arg;
            if (!value)
                die(2, "%s needs a value\n%s", name, USAGE);
            if (valued[i].number)
                *valued[i].number = number(name, value);
            else
                *valued[i].text = value;
        }
        if (!found) {
            fprintf(stderr, "gfbench: unknown argument %s\n%s", name, USAGE);
            exit(2);
        }
    }
    if (!o.bundle || (o.input && o.image)) {
        fputs(USAGE, stderr);
        exit(2);
    }
    if (o.level >= 0)
        o.flags |= GFRT_AT_MOST(o.level < GFI_MAX_LEVEL ? (uint32_t)o.level : GFI_MAX_LEVEL);
    if (o.single_stream) {
        o.runs = o.runs > SINGLE_STREAM_RUNS ? o.runs : SINGLE_STREAM_RUNS;
        o.seconds = o.seconds > SINGLE_STREAM_SECONDS ? o.seconds : SINGLE_STREAM_SECONDS;
    }
    if (o.runs < 0)
        o.runs = o.output || o.trace ? 0 : 10;
    return o;
}

#ifdef GFBENCH_STATIC

static void load_library(const char *bundle) {
    (void)bundle;
#define LINKED(name) rt.name = gfrt_##name;
    FUNCTIONS(LINKED)
}

#else

static void load_library(const char *bundle) {
    char path[4096];
    gfi_header header;
    snprintf(path, sizeof path, "%s/plan.bin", bundle);
    int file = open(path, O_RDONLY | O_NONBLOCK); /* does not wait for a pipe */
    if (file < 0)
        die(1, "%s cannot be read", path);
    if (read(file, &header, sizeof header) != sizeof header ||
        !memchr(header.library, 0, sizeof header.library) || strchr(header.library, '/'))
        die(1, "%s is damaged", path);
    close(file);
    snprintf(path, sizeof path, "%s/%s", bundle, header.library);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        die(3, "%s", dlerror());
    const struct {
        const char *name;
        void **function;
    } functions[] = {
#define ROW(name) {"gfrt_" #name, (void **)&rt.name},
        FUNCTIONS(ROW)
    };
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        *functions[i].function = dlsym(handle, functions[i].name);
        if (!*functions[i].function)
            die(1, "%s has no %s: is it older than this gfbench?", path, functions[i].name);
    }
}

#endif

typedef gfrt_status (*describe)(const gfrt_model *, size_t, gfrt_tensor_info *);

static buffers make_buffers(const gfrt_model *model, size_t count, describe info_of) {
    buffers b = {count, get_memory(count * sizeof(void *)), get_memory(count * sizeof(size_t)), 0};
    for (size_t i = 0; i < count; i++) {
        gfrt_tensor_info info;
        check(info_of(model, i, &info));
        b.sizes[i] = info.size_bytes;
        b.data[i] = get_memory(info.size_bytes);
        b.total += info.size_bytes;
    }
    return b;
}

/* The images that one inference takes: the first size of its first input. */
static size_t batch_of(const gfrt_model *model) {
    gfrt_tensor_info info;
    if (rt.input_count(model) == 0)
        return 1;
    check(rt.input_info(model, 0, &info));
    return info.ndim > 0 && info.shape[0] > 0 ? (size_t)info.shape[0] : 1;
}

static void free_buffers(buffers *b) {
    for (size_t i = 0; i < b->count; i++)
        free(b->data[i]);
    free(b->data);
    free(b->sizes);
}

/* Values like those of a normalized image, the same in every run and on every machine. */
static void fill_with_noise(const gfrt_model *model, buffers *inputs) {
    uint32_t state = 1;
    for (size_t i = 0; i < inputs->count; i++) {
        gfrt_tensor_info info;
        check(rt.input_info(model, i, &info));
        for (size_t k = 0; k < inputs->sizes[i] / (info.dtype == GFRT_FLOAT32 ? 4 : 1); k++) {
            state = state * 1664525u + 1013904223u;
            if (info.dtype == GFRT_FLOAT32)
                ((float *)inputs->data[i])[k] = (float)(state >> 8) / (float)(1 << 22) - 2.0f;
            else
                ((uint8_t *)inputs->data[i])[k] = (uint8_t)(state >> 25);
        }
    }
}

/* Reads the next inference's inputs; false at the end of the file. */
static bool read_inputs(const gfrt_model *model, const options *o, FILE *file, buffers *inputs) {
    for (size_t i = 0; i < inputs->count; i++) {
        size_t size = o->image ? inputs->sizes[i] / sizeof(float) : inputs->sizes[i];
        uint8_t *pixels = o->image ? get_memory(size) : inputs->data[i];
        size_t got = fread(pixels, 1, size, file);
        if (got == 0 && i == 0)
            return false;
        if (got != size)
            die(1, "%s has %zu bytes at the end, input %zu takes %zu", o->image ? o->image : o->input,
                got, i, size);
        if (o->image) {
            check(rt.normalize_u8(model, i, pixels, size, inputs->data[i], inputs->sizes[i]));
            free(pixels);
        }
    }
    return true;
}

void run_once(const subject *s) {
    check(rt.run(s->context, (const void *const *)s->inputs.data, s->inputs.sizes,
                 s->outputs.data, s->outputs.sizes));
}

/* One record of a trace; runtime/trace.py reads it. */
typedef struct {
    uint32_t inference, step, name_bytes, label_bytes, dtype, ndim;
    int64_t shape[GFRT_MAX_DIMS];
    float scale;
    int32_t zero_point, storage_offset;
    uint32_t reserved;
    uint64_t data_bytes;
} trace_record;

_Static_assert(sizeof(trace_record) == 96, "as in trace.py");

static void record_step(void *user, size_t step, const char *label, const gfrt_tensor_info *tensor,
                        const void *data) {
    const trace *t = user;
    trace_record record = {
        .inference = t->inference,
        .step = (uint32_t)step,
        .name_bytes = (uint32_t)strlen(tensor->name),
        .label_bytes = (uint32_t)strlen(label),
        .dtype = (uint32_t)tensor->dtype,
        .ndim = (uint32_t)tensor->ndim,
        .scale = tensor->scale,
        .zero_point = tensor->zero_point,
        .storage_offset = tensor->storage_offset,
        .data_bytes = tensor->size_bytes,
    };
    memcpy(record.shape, tensor->shape, sizeof record.shape);
    write_all(t->file, &record, sizeof record);
    write_all(t->file, tensor->name, record.name_bytes);
    write_all(t->file, label, record.label_bytes);
    write_all(t->file, data, tensor->size_bytes);
}

/* Runs each inference of the file once, or one on noise. */
static void run_inputs(const options *o, subject *s) {
    const char *path = o->image ? o->image : o->input;
    FILE *from = path ? open_file(path, "rb") : NULL;
    FILE *to = o->output ? open_file(o->output, "wb") : NULL;
    trace t = {o->trace ? open_file(o->trace, "wb") : NULL, 0};
    if (t.file) {
        write_all(t.file, "GFTRACE1", 8);
        check(rt.set_observer(s->context, record_step, &t));
    }
    if (!from)
        fill_with_noise(s->model, &s->inputs);
    while (from ? read_inputs(s->model, o, from, &s->inputs) : t.inference == 0) {
        double start = now_us();
        run_once(s);
        if (t.inference == 0)
            s->first_ms = (now_us() - start) / 1e3;
        for (size_t i = 0; to && i < s->outputs.count; i++)
            write_all(to, s->outputs.data[i], s->outputs.sizes[i]);
        t.inference++;
    }
    if (t.inference == 0)
        die(1, "%s is empty", path);
    s->inferences = t.inference;
    check(rt.set_observer(s->context, NULL, NULL));
    if (from)
        fclose(from);
    if (to)
        close_written(to);
    if (t.file)
        close_written(t.file);
}

int main(int argc, char **argv) {
    (void)argc;
    options o = parse(argv);
    int cpus[MAX_PINNED];
    size_t pinned = o.pin ? pin(o.pin, cpus) : 0; /* before threads are started */
    load_library(o.bundle);
    subject s = {0};
    double start = now_us();
    check(rt.open(o.bundle, o.flags, &s.model));
    check(rt.context_create(s.model, (uint32_t)o.threads, &s.context));
    s.load_ms = (now_us() - start) / 1e3;
    s.inputs = make_buffers(s.model, rt.input_count(s.model), rt.input_info);
    s.outputs = make_buffers(s.model, rt.output_count(s.model), rt.output_info);
    s.batch = batch_of(s.model);
    run_inputs(&o, &s);
    timing t = take_times(&o, &s);
    if (o.json)
        print_json(&o, &s, &t, cpus, pinned);
    else
        print_text(&o, &s, &t);
    close_written(stdout);
    rt.context_destroy(s.context);
    rt.close(s.model);
    free_buffers(&s.inputs);
    free_buffers(&s.outputs);
    free(t.samples);
    free(t.steps);
    return 0;
}
