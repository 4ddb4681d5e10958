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
