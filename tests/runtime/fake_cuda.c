/* A libcuda.so.1 for tests of gfrt_cuda.c: two kernels, failures on demand, and a ledger.
 *
 * FAKE_CUDA_CAPABILITY=62, FAKE_CUDA_DEVICES=1, FAKE_CUDA_FAIL=cuMemAlloc_v2 (fails with 2),
 * FAKE_CUDA_LOG=FILE: at exit, how many of each thing are still alive, and what was loaded. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long pointer;

static int contexts, depth, modules, memories, streams, events, unbalanced;
static char loaded[256];

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : otherwise;
}

static int fails(const char *name) {
    const char *failing = getenv("FAKE_CUDA_FAIL");
    return failing && strcmp(failing, name) == 0 ? 2 : 0;
}

#define BEGIN                                                                                      \
    if (fails(__func__))                                                                           \
        return 2;
#define IN_CONTEXT                                                                                 \
    BEGIN                                                                                          \
    if (depth < 1)                                                                                 \
        return 201;

__attribute__((destructor)) static void write_ledger(void) {
    const char *path = getenv("FAKE_CUDA_LOG");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (!file)
        return;
    fprintf(file, "contexts %d depth %d modules %d memories %d streams %d events %d unbalanced %d\n%s",
            contexts, depth, modules, memories, streams, events, unbalanced, loaded);
    fclose(file);
}

int cuInit(unsigned flags) { (void)flags; BEGIN return 0; }
int cuDeviceGetCount(int *count) { BEGIN *count = (int)setting("FAKE_CUDA_DEVICES", 1); return 0; }
int cuDeviceGet(int *device, int ordinal) { BEGIN *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    (void)device;
    BEGIN snprintf(name, (size_t)size, "Fake GPU");
    return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    BEGIN long capability = setting("FAKE_CUDA_CAPABILITY", 62);
    *value = attribute == 75 ? (int)capability / 10 : attribute == 76 ? (int)capability % 10 : -1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    BEGIN contexts++;
    *context = &contexts;
    return 0;
}
int cuDevicePrimaryCtxRelease(int device) { (void)device; BEGIN contexts--; return 0; }
int cuCtxPushCurrent_v2(void *context) { BEGIN depth++; return context == &contexts ? 0 : 201; }
int cuCtxPopCurrent_v2(void **context) { BEGIN depth--; *context = &contexts; return 0; }

int cuModuleLoadData(void **module, const void *image) {
    IN_CONTEXT
    const char *text = image;
    strncat(loaded, text, 40);
    if (strncmp(text, "bad", 3) == 0)
        return 209; /* CUDA_ERROR_NO_BINARY_FOR_GPU */
    modules++;
    *module = &modules;
    return 0;
}
int cuModuleUnload(void *module) { IN_CONTEXT modules--; return module == &modules ? 0 : 1; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module;
    IN_CONTEXT static char kernels[2][8] = {"add", "twice"};
    for (int i = 0; i < 2; i++) {
        if (strcmp(name, kernels[i]) == 0)
            return *function = kernels[i], 0;
    }
    return 500;
}
int cuMemAlloc_v2(pointer *memory, size_t size) {
    IN_CONTEXT void *bytes = malloc(size);
    memories++;
    memset(bytes, 0xff, size);
    *memory = (pointer)bytes;
    return 0;
}
int cuMemFree_v2(pointer memory) { IN_CONTEXT memories--; free((void *)memory); return 0; }
int cuMemcpyHtoD_v2(pointer to, const void *from, size_t size) {
    IN_CONTEXT memcpy((void *)to, from, size);
    return 0;
}
int cuMemcpyHtoDAsync_v2(pointer to, const void *from, size_t size, void *stream) {
    IN_CONTEXT unbalanced += stream != &streams;
    memcpy((void *)to, from, size);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, pointer from, size_t size, void *stream) {
    IN_CONTEXT unbalanced += stream != &streams;
    memcpy(to, (void *)from, size);
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream, void **params, void **extra) {
    IN_CONTEXT unbalanced += stream != &streams || extra || shared != 128;
    const char *name = function;
    unsigned count = gx * gy * gz * bx * by * bz;
    const float *x = *(float **)params[0];
    const float *w = *(float **)params[1];
    float *y = *(float **)params[name[0] == 'a' ? 2 : 1];
    if (!x || !w || !y)
        return 700; /* CUDA_ERROR_ILLEGAL_ADDRESS */
    for (unsigned i = 0; i < count; i++)
        y[i] = name[0] == 'a' ? x[i] + w[i] : 2 * x[i];
    return 0;
}
int cuStreamCreate(void **stream, unsigned flags) {
    IN_CONTEXT unbalanced += flags != 1;
    streams++;
    *stream = &streams;
    return 0;
}
int cuStreamDestroy_v2(void *stream) { (void)stream; IN_CONTEXT streams--; return 0; }
int cuStreamSynchronize(void *stream) { (void)stream; IN_CONTEXT return 0; }
int cuEventCreate(void **event, unsigned flags) {
    IN_CONTEXT unbalanced += flags != 0;
    events++;
    *event = calloc(1, sizeof(float));
    return 0;
}
int cuEventDestroy_v2(void *event) { IN_CONTEXT events--; free(event); return 0; }
int cuEventRecord(void *event, void *stream) {
    static float clock;
    (void)stream;
    IN_CONTEXT *(float *)event = clock;
    clock += 0.25f;
    return 0;
}
int cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    IN_CONTEXT *milliseconds = *(float *)end - *(float *)start;
    return 0;
}
int cuGetErrorName(int result, const char **text) { (void)result; *text = "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int result, const char **text) { (void)result; *text = "as asked"; return 0; }
