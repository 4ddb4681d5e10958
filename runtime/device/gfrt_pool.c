/* Worker threads that stay. A kernel's parallel loop is cut into one task for each thread, and each
 * thread takes the task of its own number: it finds in its caches what it wrote there in the kernel
 * before. A thread that is done takes tasks that nobody has begun, so a thread that the system has
 * put aside holds nobody up.
 *
 * An inference has a hundred loops of some ten microseconds, and a line of cache that another core
 * wrote takes a tenth of one. So what is shared lies in lines by who writes it, and a loop passes
 * through no lock: only a thread that goes to sleep takes one, and who has to wake it. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "gfrt_internal.h"

/* Two of x86's, which fetches them in pairs; one of Apple's. */
#define CACHE_LINE 128

/* How long a thread looks for work before it sleeps, as waking it takes the waker some 25 us and
 * itself as long again. Within an inference, longer than the loops are apart; after it, as long as
 * a caller may take from one to the next. */
#define BUSY_SECONDS 2e-3
#define IDLE_SECONDS 200e-6
/* Then, if there are more threads than CPUs, one that has work may be waiting for this CPU. */
#define YIELD_SECONDS 20e-6
#define LOOKS 32 /* between two looks at the clock */
/* Looks for a task's end before the calling thread asks whether it has begun: a question that takes
 * a line from the thread that begins tasks there, and is needless if all are awake. */
#define END_LOOKS 16

#define COPY_BYTES 65536 /* from so many on, all threads copy */

typedef struct {
    gfi_caller caller; /* first: the kernel hands back a pointer to it */
    gfi_pool *pool;
    pthread_t thread;
    char *workspace;
    size_t used;
    char message[256];
    /* The last loop whose task of this worker's number has been taken, by whomever; and the last
     * one whose task of this number is finished. */
    _Alignas(CACHE_LINE) atomic_uint_least32_t taken;
    _Alignas(CACHE_LINE) atomic_uint_least32_t finished;
} worker;

struct gfi_pool {
    /* These do not change. */
    uint32_t threads;
    uint32_t started;
    size_t workspace; /* per thread */
    char *workspaces;
    const gfi_table *table;
    worker *workers; /* number 0 is the calling thread */
    int process;     /* that has the other workers; a fork of it has none */
    bool stays;      /* on `cpus` */
    cpu_set_t cpus;

    /* What the calling thread writes. Number of the loop in the upper half, its tasks in the lower
     * one: a thread that comes late finds every task of its loop taken. The rest does not change
     * while a task of the loop is open or running. */
    _Alignas(CACHE_LINE) atomic_uint_least64_t loop;
    gfi_task task;
    void *closure;
    gfi_parallel group;
    bool in_task;
    bool alone;       /* there are no other workers */
    atomic_bool busy; /* an inference is under way */

    /* What is rarely written. */
    _Alignas(CACHE_LINE) atomic_uint sleepers; /* workers */
    atomic_bool waits;                         /* asleep: the calling thread */
    atomic_bool stop;
    atomic_int code; /* of a task that failed */
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    __asm__ volatile("yield");
#endif
}

/* Whether a thread that has been looking since `start`, 0 at first, is to look for longer. */
static bool looks_on(double *start, double seconds) {
    double now = gfi_now();
    if (*start == 0)
        *start = now;
    if (now - *start >= seconds)
        return false;
    if (now - *start >= YIELD_SECONDS)
        sched_yield();
    return true;
}

/* Whether task `index` of loop `number` is the calling thread's now. Relaxed: who takes it is all
 * that this decides. What the task reads was published with `loop`. */
static bool take(gfi_pool *pool, int index, uint32_t number) {
    atomic_uint_least32_t *taken = &pool->workers[index].taken;
    uint_least32_t last = atomic_load_explicit(taken, memory_order_relaxed);
    return (int32_t)(number - last) > 0 &&
           atomic_compare_exchange_strong_explicit(taken, &last, number, memory_order_relaxed,
                                                   memory_order_relaxed);
}

static void run_task(gfi_pool *pool, worker *w, int index) {
    int code = pool->table->call_task(&w->caller, pool->task, index, &pool->group, pool->closure);
    if (code != 0) /* relaxed: it is read once the task is known to be finished */
        atomic_store_explicit(&pool->code, code, memory_order_relaxed);
}

/* Acquire: what the task wrote is there, and it reads no more of the pool. */
static bool is_finished(gfi_pool *pool, int index, uint32_t number) {
    return atomic_load_explicit(&pool->workers[index].finished, memory_order_acquire) == number;
}

/* ---- workers ---- */

/* Runs the task of this thread, then those that nobody has begun. The calling thread runs the first
 * one itself. */
static void run_tasks(gfi_pool *pool, worker *w, uint_least64_t loop) {
    uint32_t number = (uint32_t)(loop >> 32);
    int tasks = (int)(uint32_t)loop, own = (int)(w - pool->workers);
    for (int i = 0; i < tasks; i++) {
        int index = own < tasks ? (own + i) % tasks : i;
        if (index == 0 || !take(pool, index, number))
            continue;
        run_task(pool, w, index);
        /* Sequentially consistent, as is what `wait_for` does in the other order: either this
         * thread sees that the other one waits, or that one sees that the task is finished. */
        atomic_store(&pool->workers[index].finished, number);
        if (atomic_load(&pool->waits)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

/* Acquire: the loop's task is there, and what other threads wrote in loops before. */
static uint_least64_t current_loop(gfi_pool *pool) {
    return atomic_load_explicit(&pool->loop, memory_order_acquire);
}

/* The loop after `seen`, or `seen` if none comes for a while. */
static uint_least64_t look_for_loop(gfi_pool *pool, uint_least64_t seen) {
    double start = 0, seconds;
    do {
        for (int i = 0; i < LOOKS; i++) {
            uint_least64_t loop = current_loop(pool);
            if (loop != seen)
                return loop;
            pause_briefly();
        }
        bool busy = atomic_load_explicit(&pool->busy, memory_order_relaxed);
        seconds = busy ? BUSY_SECONDS : IDLE_SECONDS;
    } while (looks_on(&start, seconds));
    return seen;
}

/* The loop after `seen`, or `seen` if there are to be no more. */
static uint_least64_t sleep_until_loop(gfi_pool *pool, uint_least64_t seen) {
    uint_least64_t loop;
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add_explicit(&pool->sleepers, 1, memory_order_relaxed);
    while ((loop = current_loop(pool)) == seen && !atomic_load(&pool->stop))
        pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub_explicit(&pool->sleepers, 1, memory_order_relaxed);
    pthread_mutex_unlock(&pool->mutex);
    return loop;
}

static void *work(void *argument) {
    worker *w = argument;
    gfi_pool *pool = w->pool;
    gfi_enter_float_mode(); /* that of whoever started this thread is inherited */
    if (pool->stays)
        sched_setaffinity(0, sizeof pool->cpus, &pool->cpus); /* as good without, if refused */
    uint_least64_t seen = 0;
    while (!atomic_load(&pool->stop)) {
        uint_least64_t loop = look_for_loop(pool, seen);
        if (loop == seen)
            loop = sleep_until_loop(pool, seen);
        if (loop != seen)
            run_tasks(pool, w, loop);
        seen = loop;
    }
    return NULL;
}

/* ---- the calling thread ---- */

static void wake_all(gfi_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

/* Tells the other threads of a loop; of one without tasks, they just wake up. Its number.
 *
 * Release: what the loop needs is there before its number. That a thread goes to sleep may be seen
 * too late here, as nothing orders the store before the load: it then sleeps through this loop,
 * whose tasks others take, and is woken by the next one. To have that ordered, each loop would wait
 * until all threads have given up their copies of the line. */
static uint32_t announce(gfi_pool *pool, int tasks) {
    uint32_t number =
        (uint32_t)(atomic_load_explicit(&pool->loop, memory_order_relaxed) >> 32) + 1;
    atomic_store_explicit(&pool->loop, (uint_least64_t)number << 32 | (uint32_t)tasks,
                          memory_order_release);
    if (atomic_load_explicit(&pool->sleepers, memory_order_relaxed) > 0)
        wake_all(pool);
    return number;
}

static bool is_finished_soon(gfi_pool *pool, int index, uint32_t number, int looks) {
    for (int i = 0; i < looks; i++) {
        if (is_finished(pool, index, number))
            return true;
        pause_briefly();
    }
    return false;
}

static void wait_for(gfi_pool *pool, int index, uint32_t number) {
    double start = 0;
    do {
        if (is_finished_soon(pool, index, number, LOOKS))
            return;
    } while (looks_on(&start, IDLE_SECONDS));
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->waits, true);
    while (atomic_load(&pool->workers[index].finished) != number)
        pthread_cond_wait(&pool->done, &pool->mutex);
    atomic_store(&pool->waits, false);
    pthread_mutex_unlock(&pool->mutex);
}

static int launch(gfi_caller *caller, gfi_task task, void *closure, int tasks) {
    worker *w = (worker *)caller;
    gfi_pool *pool = w->pool;
    if (pool->alone || pool->in_task || tasks == 1) {
        /* A loop within a parallel loop stays on its thread. */
        gfi_parallel group = {NULL, 1};
        return pool->table->call_task(caller, task, 0, &group, closure);
    }
    if (tasks <= 0 || tasks > (int)pool->threads) /* 0 asks for as many as there are */
        tasks = (int)pool->threads;
    pool->task = task;
    pool->closure = closure;
    pool->group = (gfi_parallel){NULL, tasks};
    pool->in_task = true;
    atomic_store_explicit(&pool->code, 0, memory_order_relaxed);
    uint32_t number = announce(pool, tasks);
    run_task(pool, w, 0);
    for (int i = 1; i < tasks; i++) {
        if (is_finished_soon(pool, i, number, END_LOOKS))
            continue;
        if (take(pool, i, number)) {
            run_task(pool, w, i);
            /* Relaxed: this thread alone asks. */
            atomic_store_explicit(&pool->workers[i].finished, number, memory_order_relaxed);
        }
    }
    for (int i = 1; i < tasks; i++)
        wait_for(pool, i, number);
    pool->in_task = false;
    return atomic_load_explicit(&pool->code, memory_order_relaxed);
}

gfi_caller *gfi_pool_caller(gfi_pool *pool) { return &pool->workers[0].caller; }

typedef struct {
    char *to;
    const char *from;
    size_t size;
} copy;

static int copy_part(int task, gfi_parallel *group, void *closure) {
    const copy *whole = closure;
    size_t lines = (whole->size + CACHE_LINE - 1) / CACHE_LINE, count = (size_t)group->tasks;
    size_t first = lines * (size_t)task / count * CACHE_LINE;
    size_t end = lines * ((size_t)task + 1) / count * CACHE_LINE;
    end = end < whole->size ? end : whole->size;
    memcpy(whole->to + first, whole->from + first, end - first);
    return 0;
}

void gfi_pool_copy(gfi_pool *pool, void *to, const void *from, size_t size) {
    copy whole = {to, from, size};
    launch(gfi_pool_caller(pool), copy_part, &whole, size < COPY_BYTES ? 1 : 0);
}

static void *allocate(gfi_caller *caller, uint64_t size) {
    worker *w = (worker *)caller;
    size_t room = w->pool->workspace - w->used;
    if (size > room) {
        snprintf(w->message, sizeof w->message,
                 "a kernel asks for %llu bytes of scratch, the plan has %zu of them left",
                 (unsigned long long)size, room);
        return NULL;
    }
    char *memory = w->workspace + w->used;
    w->used += ((size_t)size + GFI_ALIGNMENT - 1) / GFI_ALIGNMENT * GFI_ALIGNMENT;
    return memory;
}

/* Scratch is a stack: what lies above `memory` was released before, or its kernel failed. */
static int release(gfi_caller *caller, void *memory) {
    worker *w = (worker *)caller;
    if (memory)
        w->used = (size_t)((char *)memory - w->workspace);
    return 0;
}

static void complain(gfi_caller *caller, const char *const *parts, int32_t count) {
    worker *w = (worker *)caller;
    size_t used = 0;
    for (int32_t i = 0; i < count && used < sizeof w->message; i++) {
        int wrote = snprintf(w->message + used, sizeof w->message - used, "%s",
                             parts[i] ? parts[i] : "");
        used += wrote > 0 ? (size_t)wrote : 0;
    }
}

void gfi_pool_begin(gfi_pool *pool) {
    pool->alone = pool->threads == 1 || getpid() != pool->process;
    /* Relaxed: it decides on nothing but how long threads look for work. */
    atomic_store_explicit(&pool->busy, true, memory_order_relaxed);
    if (!pool->alone)
        announce(pool, 0);
}

void gfi_pool_end(gfi_pool *pool) {
    atomic_store_explicit(&pool->busy, false, memory_order_relaxed);
}

void gfi_pool_reset(gfi_pool *pool) {
    for (uint32_t i = 0; i < pool->threads; i++) {
        pool->workers[i].used = 0;
        pool->workers[i].message[0] = 0;
    }
}

const char *gfi_pool_message(const gfi_pool *pool) {
    for (uint32_t i = 0; i < pool->threads; i++) {
        if (pool->workers[i].message[0])
            return pool->workers[i].message;
    }
    return "";
}

/* Zeroed, from the start of a cache line on; null where there is no memory. */
static void *allocate_lines(size_t size) {
    void *memory;
    if (posix_memalign(&memory, CACHE_LINE, size) != 0)
        return NULL;
    return memset(memory, 0, size);
}

/* Starts the other workers; 0, or why the next one could not be started.
 *
 * They get no signals, which are for the threads that the application knows of: where it waits for
 * one by sigwait or signalfd, it has blocked it in those alone, and would be ended by it here. A
 * fault stays with the thread that runs into it, and a profiler's clock counts them all. */
static int start_workers(gfi_pool *pool) {
    static const int kept[] = {SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS, SIGPROF};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++)
        sigdelset(&blocked, kept[i]);
    pthread_sigmask(SIG_BLOCK, &blocked, &before);
    int code = 0;
    for (pool->started = 1; pool->started < pool->threads; pool->started++) {
        worker *w = &pool->workers[pool->started];
        code = pthread_create(&w->thread, NULL, work, w);
        if (code != 0)
            break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return code;
}

gfrt_status gfi_pool_create(uint32_t threads, size_t workspace, const gfi_table *table,
                            const cpu_set_t *cpus, gfi_pool **result) {
    gfi_pool *pool = allocate_lines(sizeof *pool);
    worker *workers = allocate_lines(threads * sizeof *workers);
    size_t each = (workspace + 4095) / 4096 * 4096;
    char *workspaces = NULL;
    if (pool && workers && each > 0) {
        workspaces = mmap(NULL, each * threads, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    if (!pool || !workers || workspaces == MAP_FAILED) {
        free(pool);
        free(workers);
        return gfi_fail(GFRT_NO_MEMORY, "no memory for %u threads with %zu bytes of scratch each",
                        threads, each);
    }
    pool->threads = threads;
    pool->workspace = each;
    pool->workspaces = workspaces;
    pool->table = table;
    pool->workers = workers;
    pool->process = getpid();
    pool->alone = threads == 1;
    pool->stays = cpus != NULL;
    if (cpus)
        pool->cpus = *cpus;
    atomic_init(&pool->loop, 0);
    atomic_init(&pool->busy, false);
    atomic_init(&pool->sleepers, 0);
    atomic_init(&pool->waits, false);
    atomic_init(&pool->stop, false);
    atomic_init(&pool->code, 0);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (uint32_t i = 0; i < threads; i++) {
        workers[i].caller = (gfi_caller){launch, allocate, release, complain};
        workers[i].pool = pool;
        workers[i].workspace = workspaces ? workspaces + i * each : NULL;
        atomic_init(&workers[i].taken, 0);
        atomic_init(&workers[i].finished, 0);
    }
    int code = start_workers(pool);
    if (code != 0) {
        gfi_fail(GFRT_NO_MEMORY, "thread %u cannot be started: %s", pool->started, strerror(code));
        gfi_pool_destroy(pool);
        return GFRT_NO_MEMORY;
    }
    *result = pool;
    return GFRT_OK;
}

void gfi_pool_destroy(gfi_pool *pool) {
    /* In a fork nobody is there to be joined, and who had the mutex will not give it back. */
    if (getpid() == pool->process) {
        atomic_store(&pool->stop, true);
        wake_all(pool);
        for (uint32_t i = 1; i < pool->started; i++)
            pthread_join(pool->workers[i].thread, NULL);
        pthread_mutex_destroy(&pool->mutex);
        pthread_cond_destroy(&pool->wake);
        pthread_cond_destroy(&pool->done);
    }
    if (pool->workspaces)
        munmap(pool->workspaces, pool->workspace * pool->threads);
    free(pool->workers);
    free(pool);
}
