#ifndef GFRT_BIONIC_STRING_H
#define GFRT_BIONIC_STRING_H

#include <stddef.h>

void *memchr(const void *data, int byte, size_t size);
int memcmp(const void *a, const void *b, size_t size);
void *memcpy(void *to, const void *from, size_t size);
void *memset(void *data, int byte, size_t size);
char *strchr(const char *text, int character);
int strcmp(const char *a, const char *b);
size_t strcspn(const char *text, const char *characters);
char *strdup(const char *text);
char *strerror(int error);
size_t strlen(const char *text);
size_t strspn(const char *text, const char *characters);

#endif
