#ifndef GFRT_BIONIC_STDLIB_H
#define GFRT_BIONIC_STDLIB_H

#include <stddef.h>

void *malloc(size_t size);
void *calloc(size_t count, size_t size);
int posix_memalign(void **memory, size_t alignment, size_t size);
void free(void *memory);
__attribute__((noreturn)) void abort(void);

#endif
