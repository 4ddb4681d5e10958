#ifndef GFRT_BIONIC_DLFCN_H
#define GFRT_BIONIC_DLFCN_H

#define RTLD_LOCAL 0
#define RTLD_NOW 2 /* 0 on 32-bit Android */

void *dlopen(const char *path, int flags);
void *dlsym(void *library, const char *symbol);
char *dlerror(void);
int dlclose(void *library);

#endif
