/* bionic, Android's libc, as far as the runtime uses it on arm64: no NDK takes part.
 *
 * Declarations, sizes and constants are those of bionic's public headers (platform/bionic,
 * libc/include) and of the arm64 kernel's user interface; all of them are frozen, apps depend on
 * them. What differs from glibc and musl: errno is behind __errno(), the types of pthread.h have
 * other sizes. Structures that could be avoided are not here: nothing calls stat. */
#ifndef GFRT_BIONIC_ERRNO_H
#define GFRT_BIONIC_ERRNO_H

int *__errno(void);
#define errno (*__errno())

#endif
