/* Thousands of parallel loops, with pauses in which workers fall asleep. Prints nothing where all is
 * as it should be. Linked with the runtime's sources under ThreadSanitizer and AddressSanitizer. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "gfrt_internal.h"

#define THREADS 4
#define FAILS_AT 7

static int failures;

static void expect(bool is_true, const char *what, int round) {
    if (!is_true) {
        printf("round %d: %s\n", round, what);
        failures++;
    }
}

static void rest(double seconds) {
    struct timespec time = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
    nanosleep(&time, NULL);
}

static double cpu_seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Each element depends on a neighbour, which another task wrote in the loop before. */
typedef struct {
    gfi_caller *caller;
    int from[THREADS], to[THREADS], inner[THREADS];
    int fails;
} work;

static int inner_task(int task, gfi_parallel *group, void *closure) {
    int *sum = closure;
    *sum += task == 0 && group->tasks == 1;
    return 0;
}

static int step(int task, gfi_parallel *group, void *closure) {
    work *w = closure;
    w->to[task] = w->from[(task + 1) % group->tasks] + 1;
    /* A loop within it stays on its thread, whichever one asks. */
    int code = w->caller->launch(w->caller, inner_task, &w->inner[task], 0);
    return task == w->fails ? FAILS_AT : code;
}

static int call_task(gfi_caller *caller, gfi_task task, int index, gfi_parallel *group,
                     void *closure) {
    (void)caller;
    return task(index, group, closure);
}

static void check_loops(gfi_pool *pool, int tasks) {
    gfi_caller *caller = gfi_pool_caller(pool);
    int count = tasks > 0 ? tasks : THREADS;
    work w = {.caller = caller, .fails = -1};
    for (int round = 1; round <= 2000; round++) {
        if (round % 200 == 0)
            rest(round % 400 == 0 ? 5e-3 : 3e-4); /* asleep, or about to be */
        if (round % 50 == 0)
            gfi_pool_begin(pool);
        if (round % 50 == 25)
            gfi_pool_end(pool);
        expect(caller->launch(caller, step, &w, tasks) == 0, "a code", round);
        for (int i = 0; i < count; i++) {
            expect(w.to[i] == round, "a task did not run once", round);
            expect(w.inner[i] == round, "an inner loop did not run once", round);
        }
        memcpy(w.from, w.to, sizeof w.from);
    }
    gfi_pool_end(pool);
    w.fails = count - 1;
    expect(caller->launch(caller, step, &w, tasks) == FAILS_AT, "no code of a task", -1);
    w.fails = -1;
    expect(caller->launch(caller, step, &w, tasks) == 0, "the code of a loop before", -1);
}

static void check_copies(gfi_pool *pool) {
    static char from[300001], to[sizeof from + 1];
    for (size_t i = 0; i < sizeof from; i++)
        from[i] = (char)(i * 7 + i / 251);
    const size_t sizes[] = {0, 1, 4096, 65536, 65537, 131072, sizeof from};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        memset(to, 'x', sizeof to);
        gfi_pool_copy(pool, to, from, sizes[i]);
        expect(memcmp(to, from, sizes[i]) == 0, "a copy differs", (int)sizes[i]);
        expect(to[sizes[i]] == 'x', "a copy goes on behind its end", (int)sizes[i]);
    }
}

/* Workers that looked for work all the time would take a second of the CPUs' time. */
static void check_idleness(gfi_pool *pool, bool ends) {
    gfi_pool_begin(pool);
    check_copies(pool);
    if (ends)
        gfi_pool_end(pool);
    double before = cpu_seconds();
    rest(0.3);
    expect(cpu_seconds() - before < 0.1, "idle threads are busy", (int)ends);
    gfi_pool_end(pool);
}

int main(void) {
    gfi_table table = {.call_task = call_task};
    gfi_pool *pool;
    for (int round = 0; round < 20; round++) { /* threads that have hardly begun, or sleep */
        if (gfi_pool_create(THREADS, 0, &table, NULL, &pool) != GFRT_OK)
            return 2;
        rest(round % 2 ? 1e-3 : 0);
        gfi_pool_destroy(pool);
    }
    if (gfi_pool_create(THREADS, 0, &table, NULL, &pool) != GFRT_OK)
        return 2;
    check_loops(pool, 0);
    check_loops(pool, 3); /* fewer than there are threads */
    check_copies(pool);
    check_idleness(pool, true);
    check_idleness(pool, false); /* an inference that goes on without loops */
    gfi_pool_destroy(pool);
    return failures != 0;
}
