/* gfbench: runs and times a bundle through its own library, as any program on the device would.
 *
 * It is linked against libc and libdl alone and loads whatever library the bundle has. */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gfrt_internal.h" /* the header of plan.bin names the library */

static const char USAGE[] =
    "usage: gfbench BUNDLE [options]\n"
    "  --input FILE      raw inputs, one inference after the other (default: a fixed noise)\n"
    "  --image-u8 FILE   the same as 8-bit RGB pixels, height x width x 3\n"
    "  --output FILE     write the raw outputs of each inference\n"
    "  --trace FILE      write each tensor that a step writes (see runtime/trace.py)\n"
    "  --runs N          time N runs (default 10; 0 with --output or --trace)\n"
    "  --warmup N        after N runs (default 2)\n"
    "  --level N         of a library for several kinds of CPU: at most the kernels of number N\n"
    "  --threads N       default 1; 0 is one for each CPU\n"
    "  --profile         time each step, too\n"
    "  --verify          check the SHA-256 of the weights\n"
    "  --json            print JSON\n";

/* The functions of gfrt.h, from the bundle's library. */
#define FUNCTIONS(F)                                                                               \
    F(last_error) F(version) F(open) F(close) F(device) F(level) F(input_count)                    \
    F(output_count) F(input_info) F(output_info) F(normalize_u8) F(context_create)                 \
    F(context_destroy) F(run) F(set_observer) F(profile_enable) F(step_count) F(profile_get)

static struct {
#define MEMBER(name) __typeof__(gfrt_##name) *name;
    FUNCTIONS(MEMBER)
} rt;

typedef struct {
    const char *bundle, *input, *image, *output, *trace;
    long runs, warmup, threads, level;
    bool profile, json;
    uint32_t flags;
} options;

typedef struct {
    size_t count;
    void **data;
    size_t *sizes;
    size_t total;
} buffers;

typedef struct {
    FILE *file;
    uint32_t inference;
} trace;

static void die(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("gfbench: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    exit(1);
}

static void check(gfrt_status status) {
    if (status != GFRT_OK)
        die("%s", rt.last_error());
}

static void *get_memory(size_t size) {
    void *memory = calloc(size + 1, 1);
    if (!memory)
        die("no memory for %zu bytes", size);
    return memory;
}

static FILE *open_file(const char *path, const char *mode) {
    FILE *file = fopen(path, mode);
    if (!file)
        die("%s cannot be %s", path, mode[0] == 'r' ? "read" : "written");
    return file;
}

static void write_all(FILE *file, const void *data, size_t size) {
    if (size > 0 && fwrite(data, 1, size, file) != size)
        die("a file cannot be written: is the disk full?");
}

static void close_written(FILE *file) {
    if (fclose(file) != 0)
        die("a file cannot be written: is the disk full?");
}

static long number(const char *option, const char *text) {
    char *end = NULL;
    long value = text ? strtol(text, &end, 10) : -1;
    if (!text || *text == 0 || *end != 0 || value < 0 || value > 1000000)
        die("%s takes a number from 0 to 1000000", option);
    return value;
}

static options parse(char **argv) {
    options o = {.runs = -1, .warmup = 2, .threads = 1, .level = -1};
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
            {"--threads", NULL, &o.threads}, {"--level", NULL, &o.level},
        };
        bool found = true;
        if (strcmp(name, "--profile") == 0)
            o.profile = true;
        else if (strcmp(name, "--json") == 0)
            o.json = true;
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
                die("%s needs a value\n%s", name, USAGE);
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
    if (o.runs < 0)
        o.runs = o.output || o.trace ? 0 : 10;
    return o;
}

static void load_library(const char *bundle) {
    char path[4096];
    gfi_header header;
    snprintf(path, sizeof path, "%s/plan.bin", bundle);
    FILE *file = open_file(path, "rb");
    if (fread(&header, 1, sizeof header, file) != sizeof header ||
        !memchr(header.library, 0, sizeof header.library) || strchr(header.library, '/'))
        die("%s is damaged", path);
    fclose(file);
    snprintf(path, sizeof path, "%s/%s", bundle, header.library);
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        die("%s", dlerror());
    const struct {
        const char *name;
        void **function;
    } functions[] = {
#define ROW(name) {"gfrt_" #name, (void **)&rt.name},
        FUNCTIONS(ROW)
    };
    for (size_t i = 0; i < sizeof functions / sizeof functions[0]; i++) {
        *functions[i].function = dlsym(library, functions[i].name);
        if (!*functions[i].function)
            die("%s has no %s: is it older than this gfbench?", path, functions[i].name);
    }
}

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
            die("%s has %zu bytes at the end, input %zu takes %zu", o->image ? o->image : o->input,
                got, i, size);
        if (o->image) {
            check(rt.normalize_u8(model, i, pixels, size, inputs->data[i], inputs->sizes[i]));
            free(pixels);
        }
    }
    return true;
}

static void run_once(gfrt_context *context, const buffers *inputs, const buffers *outputs) {
    check(rt.run(context, (const void *const *)inputs->data, inputs->sizes, outputs->data,
                 outputs->sizes));
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

static uint32_t run_inputs(const options *o, const gfrt_model *model, gfrt_context *context,
                           buffers *inputs, buffers *outputs) {
    const char *path = o->image ? o->image : o->input;
    FILE *from = path ? open_file(path, "rb") : NULL;
    FILE *to = o->output ? open_file(o->output, "wb") : NULL;
    trace t = {o->trace ? open_file(o->trace, "wb") : NULL, 0};
    if (t.file) {
        write_all(t.file, "GFTRACE1", 8);
        check(rt.set_observer(context, record_step, &t));
    }
    if (!from)
        fill_with_noise(model, inputs);
    while (from ? read_inputs(model, o, from, inputs) : t.inference == 0) {
        run_once(context, inputs, outputs);
        for (size_t i = 0; to && i < outputs->count; i++)
            write_all(to, outputs->data[i], outputs->sizes[i]);
        t.inference++;
    }
    if (t.inference == 0)
        die("%s is empty", path);
    check(rt.set_observer(context, NULL, NULL));
    if (from)
        fclose(from);
    if (to)
        close_written(to);
    if (t.file)
        close_written(t.file);
    return t.inference;
}

static double now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e3 * (double)now.tv_sec + 1e-6 * (double)now.tv_nsec;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The milliseconds of each timed run, ascending. */
static double *time_runs(const options *o, gfrt_context *context, const buffers *inputs,
                         const buffers *outputs) {
    double *ms = get_memory((size_t)o->runs * sizeof *ms);
    for (long i = 0; o->runs > 0 && i < o->warmup; i++)
        run_once(context, inputs, outputs);
    check(rt.profile_enable(context, o->profile));
    if (o->runs == 0 && o->profile)
        run_once(context, inputs, outputs);
    for (long i = 0; i < o->runs; i++) {
        double start = now_ms();
        run_once(context, inputs, outputs);
        ms[i] = now_ms() - start;
    }
    qsort(ms, (size_t)o->runs, sizeof *ms, by_size);
    return ms;
}

static double median(const double *ms, long runs) {
    return (ms[(runs - 1) / 2] + ms[runs / 2]) / 2;
}

static void print_string(const char *text) {
    putchar('"');
    for (; *text; text++) {
        if (*text == '"' || *text == '\\')
            printf("\\%c", *text);
        else if ((unsigned char)*text < 0x20)
            printf("\\u%04x", *text);
        else
            putchar(*text);
    }
    putchar('"');
}

static void print_json(const options *o, const gfrt_model *model, const gfrt_context *context,
                       uint32_t inferences, const double *ms) {
    printf("{\"device\": ");
    print_string(rt.device(model));
    printf(", \"level\": %u, \"runtime\": \"%s\", \"inferences\": %u, \"threads\": %ld, \"runs\": %ld",
           rt.level(model), rt.version(),
           inferences, o->threads, o->runs);
    if (o->runs > 0)
        printf(", \"median_ms\": %.6f, \"min_ms\": %.6f, \"p90_ms\": %.6f", median(ms, o->runs),
               ms[0], ms[o->runs * 9 / 10]);
    if (o->profile) {
        printf(", \"profile\": [");
        for (size_t i = 0; i < rt.step_count(model); i++) {
            gfrt_step_profile p;
            check(rt.profile_get(context, i, &p));
            printf("%s{\"kernel\": ", i ? ", " : "");
            print_string(p.kernel);
            printf(", \"label\": ");
            print_string(p.label);
            printf(", \"calls\": %llu, \"seconds\": %.9f}", (unsigned long long)p.calls, p.seconds);
        }
        printf("]");
    }
    printf("}\n");
}

static void print_text(const options *o, const gfrt_model *model, const gfrt_context *context,
                       uint32_t inferences, const double *ms) {
    printf("%s: %u inference%s\n", rt.device(model), inferences, inferences == 1 ? "" : "s");
    if (o->runs > 0)
        printf("median %.3f ms, min %.3f ms, p90 %.3f ms (%ld runs)\n", median(ms, o->runs),
               ms[0], ms[o->runs * 9 / 10], o->runs);
    for (size_t i = 0; o->profile && i < rt.step_count(model); i++) {
        gfrt_step_profile p;
        check(rt.profile_get(context, i, &p));
        printf("%10.3f us  %s  %s\n", 1e6 * p.seconds / (double)(p.calls ? p.calls : 1), p.kernel,
               p.label);
    }
}

int main(int argc, char **argv) {
    (void)argc;
    options o = parse(argv);
    load_library(o.bundle);
    gfrt_model *model;
    gfrt_context *context;
    check(rt.open(o.bundle, o.flags, &model));
    check(rt.context_create(model, (uint32_t)o.threads, &context));
    buffers inputs = make_buffers(model, rt.input_count(model), rt.input_info);
    buffers outputs = make_buffers(model, rt.output_count(model), rt.output_info);
    uint32_t inferences = run_inputs(&o, model, context, &inputs, &outputs);
    double *ms = time_runs(&o, context, &inputs, &outputs);
    (o.json ? print_json : print_text)(&o, model, context, inferences, ms);
    rt.context_destroy(context);
    rt.close(model);
    return 0;
}
