#ifndef GFRT_BIONIC_PTHREAD_H
#define GFRT_BIONIC_PTHREAD_H

#include <stdint.h>

/* bits/pthread_types.h, LP64 */
typedef long pthread_t;
typedef int pthread_key_t;
typedef struct {
    int32_t private_[10];
} pthread_mutex_t;
typedef struct {
    int32_t private_[12];
} pthread_cond_t;
typedef struct pthread_attr pthread_attr_t; /* only ever null here */
typedef long pthread_mutexattr_t;
typedef long pthread_condattr_t;

_Static_assert(sizeof(pthread_mutex_t) == 40 && sizeof(pthread_cond_t) == 48, "bionic's");

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *argument);
int pthread_join(pthread_t thread, void **result);

int pthread_mutex_init(pthread_mutex_t *mutex, const pthread_mutexattr_t *attributes);
int pthread_mutex_destroy(pthread_mutex_t *mutex);
int pthread_mutex_lock(pthread_mutex_t *mutex);
int pthread_mutex_unlock(pthread_mutex_t *mutex);

int pthread_cond_init(pthread_cond_t *condition, const pthread_condattr_t *attributes);
int pthread_cond_destroy(pthread_cond_t *condition);
int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex);
int pthread_cond_signal(pthread_cond_t *condition);
int pthread_cond_broadcast(pthread_cond_t *condition);

int pthread_key_create(pthread_key_t *key, void (*destructor)(void *));
int pthread_key_delete(pthread_key_t key);
void *pthread_getspecific(pthread_key_t key);
int pthread_setspecific(pthread_key_t key, const void *value);

#endif
