/* What each thread has of its own. */
#include <stdlib.h>

#include "gfrt_internal.h"

#if defined(__ANDROID__)

/* Android's loader knows thread-local variables from Android 10 on, keys it always has had. */
static pthread_key_t key;

__attribute__((constructor)) static void make_key(void) {
    /* libc's own function frees what a thread leaves: it outlives this library. */
    if (pthread_key_create(&key, free) != 0)
        abort(); /* 128 libraries have taken them all */
}

__attribute__((destructor)) static void delete_key(void) { pthread_key_delete(key); }

gfi_thread *gfi_this_thread(void) {
    gfi_thread *thread = pthread_getspecific(key);
    if (!thread) {
        thread = calloc(1, sizeof *thread);
        if (!thread || pthread_setspecific(key, thread) != 0)
            abort(); /* as thread-local variables do: nobody could be told */
    }
    return thread;
}

#else

gfi_thread *gfi_this_thread(void) {
    static _Thread_local gfi_thread thread;
    return &thread;
}

#endif

#if defined(__x86_64__)

#define USUAL_MODE 0x1f80u

static uint32_t read_mode(void) { return __builtin_ia32_stmxcsr(); }

static void write_mode(uint32_t mode) { __builtin_ia32_ldmxcsr(mode); }

#else

#define USUAL_MODE 0u

static uint32_t read_mode(void) {
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return (uint32_t)mode;
}

static void write_mode(uint32_t mode) {
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)mode));
}

#endif

uint32_t gfi_enter_float_mode(void) {
    uint32_t mode = read_mode();
    write_mode(USUAL_MODE);
    return mode;
}

void gfi_leave_float_mode(uint32_t mode) { write_mode(mode); }
