/* Worker threads that stay. A kernel's parallel loop is cut into one task for each thread, and each
 * thread takes the task of its own number: it finds in its caches what it wrote there in the kernel
 * before. A thread that is done takes tasks that nobody has begun, so a thread that the system has
 * put aside holds nobody up. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "gfrt_internal.h"

#define CACHE_LINE 64

/* How long a thread looks for work before it sleeps: more than lies between two kernels, or than
 * the input takes to be copied; about what a wake-up takes. */
#define SPIN_SECONDS 50e-6
#define LOOKS 64 /* between two looks at the clock */

typedef struct {
    gfi_caller caller; /* first: the kernel hands back a pointer to it */
    gfi_pool *pool;
    pthread_t thread;
    char *workspace;
    size_t used;
    char message[256];
    /* The last loop whose task of this worker's number has been taken, by whomever. */
    _Alignas(CACHE_LINE) atomic_uint_least32_t taken;
} worker;

struct gfi_pool {
    uint32_t threads;
    uint32_t started;
    size_t workspace; /* per thread */
    char *workspaces;
    const gfi_table *table;
    worker *workers; /* number 0 is the calling thread */
    bool stays;      /* on `cpus` */
    cpu_set_t cpus;
    bool in_task;

    /* The loop at hand; it does not change while a task of it is open or running. */
    gfi_task task;
    void *closure;
    gfi_parallel group;

    /* Number of the loop in the upper half, its tasks in the lower one: a thread that comes late
     * finds every task of its loop taken. */
    _Alignas(CACHE_LINE) atomic_uint_least64_t loop;
    _Alignas(CACHE_LINE) atomic_int finished;
    atomic_int code; /* of a task that failed */
    atomic_bool stop;
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

/* Whether task `index` of loop `number` is the calling thread's now. */
static bool take(gfi_pool *pool, int index, uint32_t number) {
    atomic_uint_least32_t *taken = &pool->workers[index].taken;
    uint_least32_t last = atomic_load(taken);
    return (int32_t)(number - last) > 0 && atomic_compare_exchange_strong(taken, &last, number);
}

static void run_task(gfi_pool *pool, worker *w, int index, int tasks) {
    int code = pool->table->call_task(&w->caller, pool->task, index, &pool->group, pool->closure);
    if (code != 0)
        atomic_store(&pool->code, code);
    if (atomic_fetch_add(&pool->finished, 1) + 1 == tasks) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_signal(&pool->done);
        pthread_mutex_unlock(&pool->mutex);
    }
}

/* Runs the task of this thread, then those that nobody has begun. */
static void run_tasks(gfi_pool *pool, worker *w, uint_least64_t loop) {
    uint32_t number = (uint32_t)(loop >> 32);
    int tasks = (int)(uint32_t)loop, own = (int)(w - pool->workers);
    for (int i = 0; i < tasks; i++) {
        int index = own < tasks ? (own + i) % tasks : i;
        if (take(pool, index, number))
            run_task(pool, w, index, tasks);
    }
}

/* The loop after `seen`, or `seen` if none comes for a while. */
static uint_least64_t look_for_loop(gfi_pool *pool, uint_least64_t seen) {
    double end = gfi_now() + SPIN_SECONDS;
    do {
        for (int i = 0; i < LOOKS; i++) {
            uint_least64_t loop = atomic_load_explicit(&pool->loop, memory_order_acquire);
            if (loop != seen)
                return loop;
            pause_briefly();
        }
    } while (gfi_now() < end);
    return seen;
}

static void *work(void *argument) {
    worker *w = argument;
    gfi_pool *pool = w->pool;
    if (pool->stays)
        sched_setaffinity(0, sizeof pool->cpus, &pool->cpus); /* as good without, if refused */
    uint_least64_t seen = 0;
    while (!atomic_load(&pool->stop)) {
        uint_least64_t loop = look_for_loop(pool, seen);
        if (loop == seen) {
            pthread_mutex_lock(&pool->mutex);
            while (atomic_load(&pool->loop) == seen && !atomic_load(&pool->stop))
                pthread_cond_wait(&pool->wake, &pool->mutex);
            pthread_mutex_unlock(&pool->mutex);
            loop = atomic_load(&pool->loop);
        }
        run_tasks(pool, w, loop);
        seen = loop;
    }
    return NULL;
}

static void wake_all(gfi_pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

/* Tells the other threads of a loop; of one without tasks, they just wake up. */
static void announce(gfi_pool *pool, int tasks) {
    uint_least64_t number = (atomic_load(&pool->loop) >> 32) + 1;
    atomic_store(&pool->loop, number << 32 | (uint32_t)tasks);
    wake_all(pool);
}

static void wait_for(gfi_pool *pool, int tasks) {
    double end = gfi_now() + SPIN_SECONDS;
    do {
        for (int i = 0; i < LOOKS; i++) {
            if (atomic_load_explicit(&pool->finished, memory_order_acquire) == tasks)
                return;
            pause_briefly();
        }
    } while (gfi_now() < end);
    pthread_mutex_lock(&pool->mutex);
    while (atomic_load(&pool->finished) < tasks)
        pthread_cond_wait(&pool->done, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
}

static int launch(gfi_caller *caller, gfi_task task, void *closure, int tasks) {
    worker *w = (worker *)caller;
    gfi_pool *pool = w->pool;
    if (pool->threads == 1 || pool->in_task || tasks == 1) {
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
    atomic_store(&pool->finished, 0);
    atomic_store(&pool->code, 0);
    announce(pool, tasks);
    run_tasks(pool, w, atomic_load(&pool->loop));
    wait_for(pool, tasks);
    pool->in_task = false;
    return atomic_load(&pool->code);
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
    for (char *at = w->message; (at = strchr(at, '\n'));)
        *at = ' '; /* an error is one line */
}

gfi_caller *gfi_pool_caller(gfi_pool *pool) { return &pool->workers[0].caller; }

void gfi_pool_rouse(gfi_pool *pool) {
    if (pool->threads > 1)
        announce(pool, 0);
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
    pool->stays = cpus != NULL;
    if (cpus)
        pool->cpus = *cpus;
    atomic_init(&pool->loop, 0);
    atomic_init(&pool->finished, 0);
    atomic_init(&pool->code, 0);
    atomic_init(&pool->stop, false);
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    for (uint32_t i = 0; i < threads; i++) {
        workers[i].caller = (gfi_caller){launch, allocate, release, complain};
        workers[i].pool = pool;
        workers[i].workspace = workspaces ? workspaces + i * each : NULL;
        atomic_init(&workers[i].taken, 0);
    }
    for (pool->started = 1; pool->started < threads; pool->started++) {
        worker *w = &workers[pool->started];
        int code = pthread_create(&w->thread, NULL, work, w);
        if (code != 0) {
            gfi_fail(GFRT_NO_MEMORY, "thread %u cannot be started: %s", pool->started,
                     strerror(code));
            gfi_pool_destroy(pool);
            return GFRT_NO_MEMORY;
        }
    }
    *result = pool;
    return GFRT_OK;
}

void gfi_pool_destroy(gfi_pool *pool) {
    atomic_store(&pool->stop, true);
    wake_all(pool);
    for (uint32_t i = 1; i < pool->started; i++)
        pthread_join(pool->workers[i].thread, NULL);
    if (pool->workspaces)
        munmap(pool->workspaces, pool->workspace * pool->threads);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    free(pool->workers);
    free(pool);
}
