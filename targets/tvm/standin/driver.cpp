// A stand-in for libcuda.so.1: the part of the CUDA driver API that the device runtime uses, on a
// machine without a GPU. A module must be a real image for the stand-in's architecture, and is
// checked to be one; what runs is the same kernels' source, compiled for this CPU
// (kernels.so beside this library, or where GFCOMPILE_STANDIN_KERNELS says).
//
// Device memory is host memory between guard pages. GFCOMPILE_STANDIN_REFUSE_CUBIN=1 makes it a
// driver that is older than the machine code and has to take the PTX.
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kernel_library.h"

#define API extern "C" __attribute__((visibility("default"))) CUresult

typedef int CUresult;
typedef unsigned long long CUdeviceptr;

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    UNSUPPORTED_PTX_VERSION = 222,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
};

static const struct {
    CUresult code;
    const char *name, *text;
} ERRORS[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {GF_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS",
     "an illegal memory access was encountered"},
    {GF_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};

enum { CONTEXTS = 16, PAGE = 64 << 10 }; // arm64 pages may be that large

struct Allocation {
    Allocation *next;
    CUdeviceptr start;
    size_t size, mapped;
    char *pages;
};
struct Module {
    const char *image;
    size_t image_size;
    void *library;
    GfKernelTable kernels;
    GfLaunch *launch;
};
struct Function {
    Function *next;
    Module *module;
    const GfKernel *kernel;
};
struct Event {
    struct timespec time;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; // held by launches and by the lists
static Allocation *allocations;
static Function *functions;
static int initialized;
static int context_handle, stream_handle; // their addresses are the handles
static CUresult sticky; // a kernel that failed takes the context with it
static __thread void *context_stack[CONTEXTS];
static __thread int contexts;

namespace {
struct Locked {
    Locked() { pthread_mutex_lock(&lock); }
    ~Locked() { pthread_mutex_unlock(&lock); }
};
} // namespace

static CUresult ready() {
    if (!initialized)
        return NOT_INITIALIZED;
    if (!contexts || !context_stack[contexts - 1])
        return INVALID_CONTEXT;
    return sticky;
}
#define READY()                                                                                    \
    if (CUresult not_ready = ready())                                                              \
    return not_ready

// The allocation that holds [start, start + size).
static Allocation *holding(CUdeviceptr start, size_t size) {
    for (Allocation *a = allocations; a; a = a->next)
        if (start >= a->start && start - a->start <= a->size && size <= a->size - (start - a->start))
            return a;
    return NULL;
}

// ---- device

API cuInit(unsigned flags) {
    if (flags)
        return INVALID_VALUE;
    initialized = 1;
    return SUCCESS;
}
API cuDriverGetVersion(int *version) {
    *version = GF_DRIVER_VERSION;
    return SUCCESS;
}
API cuDeviceGetCount(int *count) {
    *count = 1;
    return initialized ? SUCCESS : NOT_INITIALIZED;
}
API cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return !initialized ? NOT_INITIALIZED : ordinal ? INVALID_DEVICE : SUCCESS;
}
API cuDeviceGetName(char *name, int size, int device) {
    if (device)
        return INVALID_DEVICE;
    snprintf(name, (size_t)size, "stand-in for sm_%d", GF_CAPABILITY);
    return SUCCESS;
}
API cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device)
        return INVALID_DEVICE;
    switch (attribute) {
    case 1: *value = 1024; break;                  // threads per block
    case 8: *value = 48 << 10; break;              // shared memory per block
    case 10: *value = 32; break;                   // warp
    case 13: *value = GF_CLOCK_KHZ; break;
    case 16: *value = GF_MULTIPROCESSORS; break;
    case 18: *value = 1; break;                    // integrated
    case 41: *value = 1; break;                    // unified addressing
    case 75: *value = GF_CAPABILITY / 10; break;
    case 76: *value = GF_CAPABILITY % 10; break;
    default: return INVALID_VALUE;
    }
    return SUCCESS;
}

// ---- contexts: the primary one, current per thread

API cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = &context_handle;
    return !initialized ? NOT_INITIALIZED : device ? INVALID_DEVICE : SUCCESS;
}
API cuDevicePrimaryCtxRelease(int) { return SUCCESS; }
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxPushCurrent_v2(void *context) {
    if (context != &context_handle || contexts == CONTEXTS)
        return INVALID_CONTEXT;
    context_stack[contexts++] = context;
    return SUCCESS;
}
API cuCtxPopCurrent_v2(void **context) {
    if (!contexts)
        return INVALID_CONTEXT;
    void *popped = context_stack[--contexts];
    if (context)
        *context = popped;
    return SUCCESS;
}
API cuCtxSetCurrent(void *context) {
    if (contexts)
        contexts--;
    if (context)
        context_stack[contexts++] = context;
    return SUCCESS;
}
API cuCtxGetCurrent(void **context) {
    *context = contexts ? context_stack[contexts - 1] : NULL;
    return SUCCESS;
}
API cuCtxSynchronize() { return ready(); }

// ---- memory

API cuMemAlloc_v2(CUdeviceptr *memory, size_t size) {
    READY();
    if (!size)
        return INVALID_VALUE;
    size_t held = (size + 63) / 64 * 64; // keeps the alignment that vector loads want
    size_t body = (held + PAGE - 1) / PAGE * PAGE;
    size_t mapped = body + 2 * PAGE;
    void *pages = mmap(NULL, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED)
        return OUT_OF_MEMORY;
    char *first = (char *)pages + PAGE;
    if (mprotect(first, body, PROT_READ | PROT_WRITE)) {
        munmap(pages, mapped);
        return OUT_OF_MEMORY;
    }
    memset(first, 0xff, body); // NaN: what nobody wrote shows
    char *start = first + body - held; // against the guard page behind it
    Allocation *made = (Allocation *)malloc(sizeof *made);
    if (!made) {
        munmap(pages, mapped);
        return OUT_OF_MEMORY;
    }
    Locked locked;
    *made = {allocations, (CUdeviceptr)(uintptr_t)start, size, mapped, (char *)pages};
    allocations = made;
    *memory = made->start;
    return SUCCESS;
}
API cuMemFree_v2(CUdeviceptr memory) {
    Locked locked;
    for (Allocation **a = &allocations; *a; a = &(*a)->next) {
        if ((*a)->start != memory)
            continue;
        Allocation *freed = *a;
        *a = freed->next;
        munmap(freed->pages, freed->mapped);
        free(freed);
        return SUCCESS;
    }
    return INVALID_VALUE;
}
API cuMemAllocHost_v2(void **memory, size_t size) {
    READY();
    return posix_memalign(memory, 4096, size) ? OUT_OF_MEMORY : SUCCESS;
}
API cuMemFreeHost(void *memory) {
    free(memory);
    return SUCCESS;
}
API cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, size_t size) {
    READY();
    Locked locked;
    if (!holding(to, size))
        return INVALID_VALUE;
    memcpy((void *)(uintptr_t)to, from, size);
    return SUCCESS;
}
API cuMemcpyDtoH_v2(void *to, CUdeviceptr from, size_t size) {
    READY();
    Locked locked;
    if (!holding(from, size))
        return INVALID_VALUE;
    memcpy(to, (const void *)(uintptr_t)from, size);
    return SUCCESS;
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, void *) {
    return cuMemcpyHtoD_v2(to, from, size);
}
API cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, void *) {
    return cuMemcpyDtoH_v2(to, from, size);
}
API cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t size) {
    READY();
    Locked locked;
    if (!holding(to, size))
        return INVALID_VALUE;
    memset((void *)(uintptr_t)to, value, size);
    return SUCCESS;
}

// ---- streams and events: everything happens at once

API cuStreamCreate(void **stream, unsigned) {
    READY();
    *stream = &stream_handle;
    return SUCCESS;
}
API cuStreamDestroy_v2(void *) { return SUCCESS; }
API cuStreamSynchronize(void *) { return ready(); }
API cuEventCreate(void **event, unsigned) {
    READY();
    *event = calloc(1, sizeof(Event));
    return *event ? SUCCESS : OUT_OF_MEMORY;
}
API cuEventDestroy_v2(void *event) {
    free(event);
    return SUCCESS;
}
API cuEventRecord(void *event, void *) {
    READY();
    clock_gettime(CLOCK_MONOTONIC, &((Event *)event)->time);
    return SUCCESS;
}
API cuEventSynchronize(void *) { return ready(); }
API cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    const struct timespec a = ((Event *)start)->time, b = ((Event *)end)->time;
    *milliseconds = (float)((double)(b.tv_sec - a.tv_sec) * 1e3 + (double)(b.tv_nsec - a.tv_nsec) / 1e6);
    return SUCCESS;
}

// ---- modules

// A cubin is an ELF file for machine 190 (EM_CUDA) with the architecture in the lowest byte of its
// flags. Its section headers come last, so they tell its size.
static CUresult check_cubin(const unsigned char *image, size_t *size) {
    uint16_t machine, header_size, headers;
    uint32_t flags;
    uint64_t headers_at;
    memcpy(&machine, image + 18, sizeof machine);
    memcpy(&headers_at, image + 40, sizeof headers_at);
    memcpy(&flags, image + 48, sizeof flags);
    memcpy(&header_size, image + 58, sizeof header_size);
    memcpy(&headers, image + 60, sizeof headers);
    if (machine != 190)
        return INVALID_IMAGE;
    const char *refuse = getenv("GFCOMPILE_STANDIN_REFUSE_CUBIN");
    if ((flags & 0xff) != GF_CAPABILITY || (refuse && !strcmp(refuse, "1")))
        return NO_BINARY_FOR_GPU;
    *size = (size_t)headers_at + (size_t)header_size * headers;
    uint64_t program_headers_at;
    memcpy(&program_headers_at, image + 32, sizeof program_headers_at);
    if (program_headers_at > *size)
        *size = (size_t)program_headers_at;
    return SUCCESS;
}

static CUresult check_ptx(const char *image, size_t *size) {
    int major, minor, capability;
    const char *version = strstr(image, ".version "), *target = strstr(image, ".target sm_");
    if (!version || !target || sscanf(version, ".version %d.%d", &major, &minor) != 2 ||
        sscanf(target, ".target sm_%d", &capability) != 1)
        return INVALID_PTX;
    if (major * 10 + minor > GF_PTX_ISA)
        return UNSUPPORTED_PTX_VERSION;
    if (capability > GF_CAPABILITY)
        return NO_BINARY_FOR_GPU;
    *size = strlen(image);
    return SUCCESS;
}

static bool beside(char *path, size_t size) {
    Dl_info info;
    if (!dladdr((void *)cuInit, &info) || !info.dli_fname)
        return false;
    const char *slash = strrchr(info.dli_fname, '/');
    int folder = slash ? (int)(slash - info.dli_fname + 1) : 0;
    return snprintf(path, size, "%.*skernels.so", folder, info.dli_fname) < (int)size;
}

API cuModuleLoadData(void **module, const void *image) {
    READY();
    bool is_elf = !memcmp(image, "\177ELF", 4);
    size_t size = 0;
    CUresult status = is_elf ? check_cubin((const unsigned char *)image, &size)
                             : check_ptx((const char *)image, &size);
    if (status)
        return status;
    char near[4096];
    const char *path = getenv("GFCOMPILE_STANDIN_KERNELS");
    if (!path)
        path = beside(near, sizeof near) ? near : "kernels.so";
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "stand-in: %s\n", dlerror());
        return FILE_NOT_FOUND;
    }
    Module *made = (Module *)calloc(1, sizeof *made);
    char *copy = (char *)malloc(size); // the caller may drop its own
    if (!made || !copy) {
        free(made);
        free(copy);
        return OUT_OF_MEMORY;
    }
    memcpy(copy, image, size);
    *made = {copy, size, library, (GfKernelTable)dlsym(library, "gf_kernels"),
             (GfLaunch *)dlsym(library, "gf_launch_kernel")};
    *module = made;
    return SUCCESS;
}
API cuModuleLoadDataEx(void **module, const void *image, unsigned, void *, void **) {
    return cuModuleLoadData(module, image);
}
API cuModuleUnload(void *handle) {
    Module *module = (Module *)handle;
    Locked locked;
    for (Function **f = &functions; *f;) {
        Function *function = *f;
        if (function->module != module) {
            f = &function->next;
            continue;
        }
        *f = function->next;
        free(function);
    }
    dlclose(module->library);
    free((void *)module->image);
    free(module);
    return SUCCESS;
}
API cuModuleGetFunction(void **function, void *handle, const char *name) {
    READY();
    Module *module = (Module *)handle;
    const GfKernel *kernel = module->kernels;
    while (kernel->name && strcmp(kernel->name, name))
        kernel++;
    // The image must have it too: what runs on the board is the image.
    if (!kernel->name || !memmem(module->image, module->image_size, name, strlen(name)))
        return NOT_FOUND;
    Function *made = (Function *)malloc(sizeof *made);
    if (!made)
        return OUT_OF_MEMORY;
    Locked locked;
    *made = {functions, module, kernel};
    functions = made;
    *function = made;
    return SUCCESS;
}
API cuFuncGetAttribute(int *value, int attribute, void *function) {
    if (attribute != 0) // the most threads of a block; the rest is known to ptxas alone
        return INVALID_VALUE;
    *value = (int)((Function *)function)->kernel->threads;
    return SUCCESS;
}

static bool fits(const unsigned *sizes, unsigned x, unsigned y, unsigned z) {
    return sizes[0] && sizes[1] && sizes[2] && sizes[0] <= x && sizes[1] <= y && sizes[2] <= z;
}

API cuLaunchKernel(void *handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void *, void **params,
                   void **extra) {
    READY();
    const GfKernel *kernel = ((Function *)handle)->kernel;
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    if (!fits(grid, 0x7fffffff, 65535, 65535) || !fits(block, 1024, 1024, 64) ||
        block_x * block_y * block_z > kernel->threads || shared_bytes > 48 << 10 || extra) {
        fprintf(stderr, "stand-in: %s: grid (%u, %u, %u), block (%u, %u, %u), %u shared bytes: not "
                        "to be launched so\n",
                kernel->name, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes);
        return INVALID_VALUE;
    }
    Locked locked;
    for (unsigned i = 0; i < kernel->parameters; i++)
        if (!holding(*(CUdeviceptr *)params[i], 1)) {
            fprintf(stderr, "stand-in: %s: parameter %u points to no device memory\n", kernel->name,
                    i);
            return sticky = GF_ILLEGAL_ADDRESS;
        }
    return sticky = ((Function *)handle)->module->launch(kernel, params, grid, block);
}

// ---- errors

static CUresult describe(CUresult code, const char **name, const char **text) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof ERRORS[0]; i++)
        if (ERRORS[i].code == code) {
            *name = ERRORS[i].name;
            *text = ERRORS[i].text;
            return SUCCESS;
        }
    *name = *text = NULL;
    return INVALID_VALUE;
}
API cuGetErrorName(CUresult code, const char **name) {
    const char *text;
    return describe(code, name, &text);
}
API cuGetErrorString(CUresult code, const char **text) {
    const char *name;
    return describe(code, &name, text);
}
