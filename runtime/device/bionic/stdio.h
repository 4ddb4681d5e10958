#ifndef GFRT_BIONIC_STDIO_H
#define GFRT_BIONIC_STDIO_H

#include <stdarg.h>
#include <stddef.h>

typedef struct bionic_file FILE; /* opaque */

#define SEEK_SET 0
#define SEEK_END 2

FILE *fdopen(int file, const char *mode);
FILE *fopen(const char *path, const char *mode);
int fclose(FILE *file);
size_t fread(void *data, size_t size, size_t count, FILE *file);
int fseek(FILE *file, long offset, int whence);
long ftell(FILE *file);
int snprintf(char *text, size_t size, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
int vsnprintf(char *text, size_t size, const char *format, va_list arguments);

#endif
