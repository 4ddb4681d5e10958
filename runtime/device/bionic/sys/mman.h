#ifndef GFRT_BIONIC_SYS_MMAN_H
#define GFRT_BIONIC_SYS_MMAN_H

#include <stddef.h>

#define PROT_READ 1
#define PROT_WRITE 2
#define MAP_SHARED 1
#define MAP_PRIVATE 2
#define MAP_ANONYMOUS 32
#define MADV_HUGEPAGE 14
#define MAP_FAILED ((void *)-1)

void *mmap(void *address, size_t size, int protection, int flags, int file, long offset);
int madvise(void *address, size_t size, int advice);
int mprotect(void *address, size_t size, int protection);
int munmap(void *address, size_t size);

#endif
