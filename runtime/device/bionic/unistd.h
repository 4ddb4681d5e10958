#ifndef GFRT_BIONIC_UNISTD_H
#define GFRT_BIONIC_UNISTD_H

#include <stddef.h>

int close(int file);
int getpid(void);
long lseek(int file, long offset, int whence);

#endif
