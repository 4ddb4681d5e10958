/* What of bionic's arm64 ABI differs from glibc's, on top of glibc: for libraries that were linked
 * for Android and are to run under QEMU. Link it before libc. Its mutexes, conditions and sets of
 * signals are as small as bionic's, and what a library has behind them must stay as it was. */
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int *__errno(void);
int *__errno(void) { return &errno; }

/* In the first 8 bytes lies the address of glibc's own; the others are guarded. */
typedef struct {
    void *real;
    unsigned char rest[32];
} small_mutex;
typedef struct {
    void *real;
    unsigned char rest[40];
} small_condition;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *function = dlsym(RTLD_NEXT, name);
    if (!function)
        abort();
    return function;
}

static void *create(unsigned char *rest, size_t rest_size, size_t size) {
    memset(rest, 0xa5, rest_size);
    return calloc(1, size);
}

static void *check(void *object, const unsigned char *rest, size_t rest_size) {
    for (size_t i = 0; i < rest_size; i++) {
        if (rest[i] != 0xa5) {
            fputs("bionic_on_glibc: used without init, or written over\n", stderr);
            abort();
        }
    }
    return object;
}

static pthread_mutex_t *mutex_of(pthread_mutex_t *mutex) {
    small_mutex *small = (void *)mutex;
    return check(small->real, small->rest, sizeof small->rest);
}

static pthread_cond_t *condition_of(pthread_cond_t *condition) {
    small_condition *small = (void *)condition;
    return check(small->real, small->rest, sizeof small->rest);
}

int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes) {
    small_mutex *small = (void *)mutex;
    small->real = create(small->rest, sizeof small->rest, sizeof *mutex);
    return REAL(pthread_mutex_init)(small->real, attributes);
}

int pthread_mutex_destroy(pthread_mutex_t *mutex) {
    pthread_mutex_t *own = mutex_of(mutex);
    int code = REAL(pthread_mutex_destroy)(own);
    free(own);
    return code;
}

int pthread_mutex_lock(pthread_mutex_t *mutex) { return REAL(pthread_mutex_lock)(mutex_of(mutex)); }

int pthread_mutex_unlock(pthread_mutex_t *mutex) {
    return REAL(pthread_mutex_unlock)(mutex_of(mutex));
}

int pthread_cond_init(pthread_cond_t *condition, const pthread_condattr_t *attributes) {
    small_condition *small = (void *)condition;
    small->real = create(small->rest, sizeof small->rest, sizeof *condition);
    return REAL(pthread_cond_init)(small->real, attributes);
}

int pthread_cond_destroy(pthread_cond_t *condition) {
    pthread_cond_t *own = condition_of(condition);
    int code = REAL(pthread_cond_destroy)(own);
    free(own);
    return code;
}

int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex) {
    return REAL(pthread_cond_wait)(condition_of(condition), mutex_of(mutex));
}

int pthread_cond_signal(pthread_cond_t *condition) {
    return REAL(pthread_cond_signal)(condition_of(condition));
}

int pthread_cond_broadcast(pthread_cond_t *condition) {
    return REAL(pthread_cond_broadcast)(condition_of(condition));
}

#define SET_BYTES 8 /* glibc's has 128 */

int sigfillset(sigset_t *set) {
    memset(set, 0xff, SET_BYTES);
    return 0;
}

int sigdelset(sigset_t *set, int signal) {
    *(unsigned long *)set &= ~(1ul << (signal - 1));
    return 0;
}

int pthread_sigmask(int how, const sigset_t *set, sigset_t *before) {
    sigset_t own, found;
    memset(&own, 0, sizeof own);
    if (set)
        memcpy(&own, set, SET_BYTES);
    int code = REAL(pthread_sigmask)(how, set ? &own : NULL, &found);
    if (before)
        memcpy(before, &found, SET_BYTES);
    return code;
}
