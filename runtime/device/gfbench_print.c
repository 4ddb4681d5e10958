/* What gfbench found, for people and for programs. */

#include "gfbench.h"

/* Resident at most, in megabytes: of this program alone, where getrusage would still count the one
 * that it was forked from. */
static double peak_memory_mb(void) {
    FILE *file = fopen("/proc/self/status", "r");
    char line[256];
    double kib = 0;
    while (file && fgets(line, sizeof line, file) && sscanf(line, "VmHWM: %lf kB", &kib) != 1)
        ;
    if (file)
        fclose(file);
    return kib * 1.024e-3;
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

static void print_steps(const subject *s, const timing *t) {
    printf(", \"kernels_us\": %.3f, \"profile\": [", t->kernels_us);
    for (size_t i = 0; i < rt.step_count(s->model); i++) {
        gfrt_step_profile p;
        check(rt.profile_get(s->context, i, &p));
        printf("%s{\"kernel\": ", i ? ", " : "");
        print_string(p.kernel);
        printf(", \"label\": ");
        print_string(p.label);
        printf(", \"calls\": %llu, \"seconds\": %.9f, \"median_us\": %.3f}",
               (unsigned long long)t->steps[i].calls, t->steps[i].total_s, t->steps[i].median_us);
    }
    printf("]");
}

static void print_samples(const timing *t) {
    summary all = summarize(t->samples, t->runs);
    printf(", \"min_ms\": %.6f, \"median_ms\": %.6f, \"mean_ms\": %.6f, \"p90_ms\": %.6f, "
           "\"p99_ms\": %.6f, \"max_ms\": %.6f, \"cv\": %.6f, \"samples_us\": [",
           all.min / 1e3, all.median / 1e3, all.mean / 1e3, all.p90 / 1e3, all.p99 / 1e3,
           all.max / 1e3, all.cv);
    for (size_t i = 0; i < t->runs; i++)
        printf("%s%.3f", i ? "," : "", t->samples[i]);
    printf("]");
}

void print_json(const options *o, const subject *s, const timing *t, const int *cpus,
                size_t pinned) {
    printf("{\"device\": ");
    print_string(rt.device(s->model));
    printf(", \"level\": %u", (unsigned)rt.level(s->model));
    printf(", \"runtime\": \"%s\", \"inferences\": %u, \"batch\": %zu, \"threads\": %ld, "
           "\"pinned\": [",
           rt.version(), s->inferences, s->batch, o->threads);
    for (size_t i = 0; i < pinned; i++)
        printf("%s%d", i ? ", " : "", cpus[i]);
    printf("], \"load_ms\": %.6f, \"first_ms\": %.6f, \"runs\": %zu, \"rule\": \"%s\", "
           "\"timer\": \"%s\", \"warmup_runs\": %zu, \"stable\": %s, \"duration_s\": %.6f",
           s->load_ms, s->first_ms, t->runs, o->single_stream ? "single-stream" : "runs",
           o->kernels_only ? "kernels" : "whole", t->warmup_runs, t->stable ? "true" : "false",
           t->duration_s);
    if (t->runs > 0)
        print_samples(t);
    if (t->steps)
        print_steps(s, t);
    printf(", \"peak_memory_mb\": %.3f}\n", peak_memory_mb());
}

void print_text(const options *o, const subject *s, const timing *t) {
    printf("%s: %u inference%s\n", rt.device(s->model), s->inferences,
           s->inferences == 1 ? "" : "s");
    printf("loaded in %.3f ms, first inference %.3f ms, peak memory %.1f MB\n", s->load_ms,
           s->first_ms, peak_memory_mb());
    if (t->runs > 0) {
        summary all = summarize(t->samples, t->runs);
        printf("median %.3f ms, min %.3f ms, p90 %.3f ms, p99 %.3f ms, CV %.1f%% "
               "(%zu runs after %zu to warm up%s%s)\n",
               all.median / 1e3, all.min / 1e3, all.p90 / 1e3, all.p99 / 1e3, 100 * all.cv,
               t->runs, t->warmup_runs,
               o->warmup == UNTIL_STABLE && !t->stable ? ", which did not get stable" : "",
               o->kernels_only ? "; kernels alone, without copies" : "");
        if (s->batch > 1)
            printf("per image: median %.3f ms, min %.3f ms, p90 %.3f ms (%zu images per "
                   "inference)\n",
                   all.median / 1e3 / (double)s->batch, all.min / 1e3 / (double)s->batch,
                   all.p90 / 1e3 / (double)s->batch, s->batch);
        if (o->single_stream)
            printf("MLPerf single-stream: %.3f ms\n", all.p90 / 1e3);
    }
    for (size_t i = 0; t->steps && i < rt.step_count(s->model); i++) {
        gfrt_step_profile p;
        check(rt.profile_get(s->context, i, &p));
        printf("%10.3f us  %s  %s\n", t->steps[i].median_us, p.kernel, p.label);
    }
}
