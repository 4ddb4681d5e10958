/* Launches kernels through libcuda.so.1, as run_gpu_kernel.py tells it.
 *
 *     run_gpu_kernel IMAGE SCRIPT
 *
 * Lines of SCRIPT: `tensor FILE` gives the next tensor, in device memory of its own; `launch SYMBOL
 * GX GY GZ BX BY BZ N T...` launches a kernel on the tensors of the numbers T. At the end each
 * tensor's file is written again. Exits with 3 when the driver reports an error. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { TENSORS = 512, PARAMETERS = 16 };

typedef uint64_t pointer;

static void *driver;

static void *symbol(const char *name) {
    void *function = dlsym(driver, name);
    if (!function) {
        fprintf(stderr, "no %s\n", name);
        exit(4);
    }
    return function;
}

static void check(const char *name, int status) {
    if (status == 0)
        return;
    const char *text = NULL;
    int (*error_name)(int, const char **) = symbol("cuGetErrorName");
    error_name(status, &text);
    fprintf(stderr, "%s: %d %s\n", name, status, text ? text : "?");
    exit(3);
}

/* CALL(cuInit, (unsigned), (0)) */
#define CALL(name, types, arguments) check(#name, ((int(*) types)symbol(#name)) arguments)

static char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(4);
    }
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file);
    rewind(file);
    char *bytes = calloc(1, *size + 1); /* PTX ends with a zero */
    if (!bytes || fread(bytes, 1, *size, file) != *size)
        exit(4);
    fclose(file);
    return bytes;
}

int main(int count, char **arguments) {
    static char *paths[TENSORS], *hosts[TENSORS];
    static size_t sizes[TENSORS];
    static pointer memory[TENSORS];
    int tensors = 0;
    if (count != 3 || !(driver = dlopen("libcuda.so.1", RTLD_NOW))) {
        fprintf(stderr, "%s\n", count == 3 ? dlerror() : "usage: run_gpu_kernel IMAGE SCRIPT");
        return 4;
    }
    void *context, *module, *function;
    size_t image_size;
    CALL(cuInit, (unsigned), (0));
    CALL(cuDevicePrimaryCtxRetain, (void **, int), (&context, 0));
    CALL(cuCtxPushCurrent_v2, (void *), (context));
    CALL(cuModuleLoadData, (void **, const void *), (&module, read_file(arguments[1], &image_size)));

    FILE *script = fopen(arguments[2], "r");
    char word[512];
    while (script && fscanf(script, "%511s", word) == 1) {
        if (word[0] == 't') {
            if (tensors == TENSORS || fscanf(script, "%511s", word) != 1)
                return 4;
            size_t length = snprintf(NULL, 0, "%s", word) + 1u;
            paths[tensors] = malloc(length);
            snprintf(paths[tensors], length, "%s", word);
            hosts[tensors] = read_file(word, &sizes[tensors]);
            CALL(cuMemAlloc_v2, (pointer *, size_t), (&memory[tensors], sizes[tensors]));
            CALL(cuMemcpyHtoD_v2, (pointer, const void *, size_t),
                 (memory[tensors], hosts[tensors], sizes[tensors]));
            tensors++;
            continue;
        }
        unsigned d[6], parameters, tensor;
        void *params[PARAMETERS];
        if (fscanf(script, "%511s %u %u %u %u %u %u %u", word, d, d + 1, d + 2, d + 3, d + 4, d + 5,
                   &parameters) != 8 || parameters > PARAMETERS)
            return 4;
        for (unsigned i = 0; i < parameters; i++) {
            if (fscanf(script, "%u", &tensor) != 1 || tensor >= TENSORS)
                return 4;
            params[i] = &memory[tensor];
        }
        CALL(cuModuleGetFunction, (void **, void *, const char *), (&function, module, word));
        CALL(cuLaunchKernel,
             (void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *,
              void **, void **),
             (function, d[0], d[1], d[2], d[3], d[4], d[5], 0, NULL, params, NULL));
    }
    CALL(cuCtxSynchronize, (void), ());
    for (int i = 0; i < tensors; i++) {
        CALL(cuMemcpyDtoH_v2, (void *, pointer, size_t), (hosts[i], memory[i], sizes[i]));
        FILE *file = fopen(paths[i], "wb");
        if (!file || fwrite(hosts[i], 1, sizes[i], file) != sizes[i] || fclose(file))
            return 4;
    }
    return 0;
}
