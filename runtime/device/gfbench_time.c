/* Warm-up, timed runs, the profile of steps, and what they come to. */
#include <math.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gfbench.h"
#include "gfrt_cores.h"

/* Warm is when the medians of three windows in a row are this close to each other, and a governor
 * has had the time to raise the clock. */
#define WINDOW 8
#define WINDOWS 3
#define CLOSE 0.02
#define WARMUP_LEAST_US 0.3e6
#define WARMUP_MOST_US 10e6

#define PROFILE_RUNS 50

double now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

/* ---- pinning ---- */

/* Reads "0,2-3" into `set`. */
static void read_list(const char *text, cpu_set_t *set) {
    CPU_ZERO(set);
    for (const char *at = text; *at;) {
        char *end;
        long first = strtol(at, &end, 10), last = first;
        bool good = end != at && first >= 0;
        if (good && *end == '-') {
            at = end + 1;
            last = strtol(at, &end, 10);
            good = end != at;
        }
        good = good && first <= last && last < CPU_SETSIZE;
        good = good && (*end == 0 || (*end == ',' && end[1] != 0));
        if (!good)
            die(2, "--pin takes big, or CPUs such as 0,2-3; not %s", text);
        for (long cpu = first; cpu <= last; cpu++)
            CPU_SET((int)cpu, set);
        at = *end ? end + 1 : end;
    }
}

size_t pin(const char *wanted, int cpus[MAX_PINNED]) {
    cpu_set_t set;
    if (strcmp(wanted, "big") != 0)
        read_list(wanted, &set);
    else if (sched_getaffinity(0, sizeof set, &set) == 0)
        gfi_keep_big(GFI_CPUS, &set);
    else
        die(1, "--pin big: the system does not say on which CPUs this may run");
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        die(1, "--pin %s: this process may not run on these CPUs", wanted);
    size_t count = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE && count < MAX_PINNED; cpu++) {
        if (CPU_ISSET(cpu, &set))
            cpus[count++] = cpu;
    }
    return count;
}

/* ---- statistics ---- */

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_of(double *values, size_t count) {
    qsort(values, count, sizeof *values, by_size);
    return (values[(count - 1) / 2] + values[count / 2]) / 2;
}

/* The smallest value that so many per cent of them do not exceed. */
static double percentile(const double *sorted, size_t count, size_t percent) {
    size_t rank = (count * percent + 99) / 100;
    return sorted[rank > 0 ? rank - 1 : 0];
}

summary summarize(const double *samples, size_t count) {
    summary s = {0};
    if (count == 0)
        return s;
    double *sorted = get_memory(count * sizeof *sorted);
    memcpy(sorted, samples, count * sizeof *sorted);
    s.median = median_of(sorted, count);
    s.min = sorted[0];
    s.max = sorted[count - 1];
    s.p90 = percentile(sorted, count, 90);
    s.p99 = percentile(sorted, count, 99);
    double variance = 0;
    for (size_t i = 0; i < count; i++)
        s.mean += sorted[i] / (double)count;
    for (size_t i = 0; i < count; i++)
        variance += (sorted[i] - s.mean) * (sorted[i] - s.mean) / (double)count;
    s.cv = s.mean > 0 ? sqrt(variance) / s.mean : 0;
    free(sorted);
    return s;
}

/* ---- runs ---- */

static double kernels_us(const subject *s) {
    double seconds = 0;
    for (size_t i = 0; i < rt.step_count(s->model); i++) {
        gfrt_step_profile p;
        check(rt.profile_get(s->context, i, &p));
        seconds += p.seconds;
    }
    return 1e6 * seconds;
}

/* One run in microseconds: from the input that is to be copied in to the output that is there, or
 * of the kernels alone. */
static double timed_run(const subject *s, bool kernels_only) {
    if (kernels_only) {
        check(rt.profile_enable(s->context, 1));
        run_once(s);
        return kernels_us(s);
    }
    double start = now_us();
    run_once(s);
    return now_us() - start;
}

static bool are_close(const double medians[WINDOWS]) {
    double least = medians[0], most = medians[0];
    for (size_t i = 1; i < WINDOWS; i++) {
        least = medians[i] < least ? medians[i] : least;
        most = medians[i] > most ? medians[i] : most;
    }
    return most - least <= CLOSE * least;
}

static void warm_up(const options *o, const subject *s, timing *t) {
    if (o->warmup != UNTIL_STABLE) {
        for (; t->warmup_runs < (size_t)o->warmup; t->warmup_runs++)
            run_once(s);
        return;
    }
    double medians[WINDOWS] = {0}, window[WINDOW], start = now_us(), end = start + WARMUP_MOST_US;
    for (size_t windows = 0; !t->stable && now_us() < end; windows++) {
        size_t runs = 0;
        do {
            window[runs++] = timed_run(s, o->kernels_only);
        } while (runs < WINDOW && now_us() < end);
        t->warmup_runs += runs;
        medians[windows % WINDOWS] = median_of(window, runs);
        t->stable = runs == WINDOW && windows + 1 >= WINDOWS && are_close(medians) &&
                    now_us() - start >= WARMUP_LEAST_US;
    }
}

/* At least --runs runs, and at least --seconds. */
static void time_runs(const options *o, const subject *s, timing *t) {
    size_t room = (size_t)o->runs;
    t->samples = get_memory(room * sizeof *t->samples);
    double start = now_us(), least = 1e6 * (double)o->seconds;
    while (t->runs < (size_t)o->runs || now_us() - start < least) {
        if (t->runs == room) {
            room = 2 * room + 1024;
            t->samples = realloc(t->samples, room * sizeof *t->samples);
            if (!t->samples)
                die(1, "no memory for %zu samples", room);
        }
        t->samples[t->runs++] = timed_run(s, o->kernels_only);
    }
    t->duration_s = 1e-6 * (now_us() - start);
}

/* Apart from the timed runs: taking the time of each step takes time. */
static void profile_steps(const options *o, const subject *s, timing *t) {
    size_t steps = rt.step_count(s->model);
    size_t runs = o->runs < 1 ? 1 : o->runs < PROFILE_RUNS ? (size_t)o->runs : PROFILE_RUNS;
    double *us = get_memory((steps + 1) * runs * sizeof *us);
    t->steps = get_memory(steps * sizeof *t->steps);
    for (size_t run = 0; run < runs; run++) {
        check(rt.profile_enable(s->context, 1));
        run_once(s);
        us[steps * runs + run] = kernels_us(s);
        for (size_t i = 0; i < steps; i++) {
            gfrt_step_profile p;
            check(rt.profile_get(s->context, i, &p));
            us[i * runs + run] = 1e6 * p.seconds;
            t->steps[i].total_s += p.seconds;
            t->steps[i].calls += p.calls;
        }
    }
    for (size_t i = 0; i < steps; i++)
        t->steps[i].median_us = median_of(us + i * runs, runs);
    t->kernels_us = median_of(us + steps * runs, runs);
    free(us);
}

timing take_times(const options *o, const subject *s) {
    timing t = {0};
    if (o->runs > 0) {
        warm_up(o, s, &t);
        time_runs(o, s, &t);
    }
    check(rt.profile_enable(s->context, 0));
    if (o->profile)
        profile_steps(o, s, &t);
    check(rt.profile_enable(s->context, 0));
    return t;
}
