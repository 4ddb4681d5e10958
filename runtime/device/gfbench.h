/* What the parts of gfbench share: gfbench.c runs a bundle on given inputs, gfbench_time.c takes
 * times, gfbench_print.c tells them. */
#ifndef GFBENCH_H
#define GFBENCH_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "gfrt.h"

/* The functions of gfrt.h, from the bundle's library. */
#define FUNCTIONS(F)                                                                               \
    F(last_error) F(version) F(open) F(close) F(device) F(level) F(input_count)                    \
    F(output_count) F(input_info) F(output_info) F(normalize_u8) F(context_create)                 \
    F(context_destroy) F(run) F(set_observer) F(profile_enable) F(step_count) F(profile_get)

typedef struct {
#define MEMBER(name) __typeof__(gfrt_##name) *name;
    FUNCTIONS(MEMBER)
#undef MEMBER
} library;

extern library rt;

#define MAX_PINNED 1024
#define UNTIL_STABLE (-1)

typedef struct {
    const char *bundle, *input, *image, *output, *trace, *pin;
    long runs, seconds, warmup, threads, level;
    bool single_stream, kernels_only, profile, json;
    uint32_t flags;
} options;

typedef struct {
    size_t count;
    void **data;
    size_t *sizes;
    size_t total;
} buffers;

/* A model that is ready to run. */
typedef struct {
    gfrt_model *model;
    gfrt_context *context;
    buffers inputs, outputs;
    double load_ms;  /* opened, weights mapped, context created */
    double first_ms; /* the first inference */
    uint32_t inferences;
    size_t batch; /* images per inference */
} subject;

typedef struct {
    double median_us, total_s;
    uint64_t calls;
} step_time;

/* Times of runs; `samples` are microseconds in order of time. */
typedef struct {
    double *samples;
    size_t runs;
    double duration_s;
    size_t warmup_runs;
    bool stable;
    step_time *steps; /* null unless a profile was asked for */
    double kernels_us; /* median of all steps together, with a profile */
} timing;

typedef struct {
    double min, median, mean, p90, p99, max, cv;
} summary;

/* gfbench.c */
void die(int code, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
void check(gfrt_status status);
void *get_memory(size_t size);
void run_once(const subject *s);

/* gfbench_time.c */
double now_us(void);
/* Binds this process, and the threads that it will start, to the CPUs of --pin. */
size_t pin(const char *wanted, int cpus[MAX_PINNED]);
timing take_times(const options *o, const subject *s);
summary summarize(const double *samples, size_t count);

/* gfbench_print.c */
void print_json(const options *o, const subject *s, const timing *t, const int *cpus,
                size_t pinned);
void print_text(const options *o, const subject *s, const timing *t);

#endif
