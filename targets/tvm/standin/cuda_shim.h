// What the CUDA C that TVM writes needs to be compiled for a CPU: one fiber per thread.
//
// Included before the kernels, in the same file as fibers.h, so that everything stays private to
// the kernel library. Only what our kernels can contain is here.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

#define __global__
#define __launch_bounds__(...)
// One section for all shared memory, which is poisoned before each block; `used`, or the compiler
// would take an array that no kernel writes for zeros.
#define __shared__ static __attribute__((section("gf_shared"), used))
// `static alignas(64) T x` is no C++; with the GNU spelling it is.
#define alignas(bytes) __attribute__((aligned(bytes)))

struct Dim3 {
    unsigned x, y, z;
};
static Dim3 threadIdx, blockIdx, blockDim, gridDim;

#define GF_VECTORS(T, E)                                                                           \
    struct T##2 {                                                                                  \
        E x, y;                                                                                    \
    } __attribute__((aligned(2 * sizeof(E))));                                                     \
    struct T##3 {                                                                                  \
        E x, y, z;                                                                                 \
    };                                                                                             \
    struct T##4 {                                                                                  \
        E x, y, z, w;                                                                              \
    } __attribute__((aligned(sizeof(E) > 4 ? 16 : 4 * sizeof(E))));                                \
    static inline T##2 make_##T##2(E x, E y) { return {x, y}; }                                    \
    static inline T##3 make_##T##3(E x, E y, E z) { return {x, y, z}; }                            \
    static inline T##4 make_##T##4(E x, E y, E z, E w) { return {x, y, z, w}; }
GF_VECTORS(float, float)
GF_VECTORS(int, int)
GF_VECTORS(uint, unsigned)
GF_VECTORS(char, signed char)
GF_VECTORS(uchar, unsigned char)
GF_VECTORS(short, short)
GF_VECTORS(ushort, unsigned short)
GF_VECTORS(longlong, long long)
#undef GF_VECTORS

template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float gf_rsqrt(float x) { return 1.0f / sqrtf(x); }
#define rsqrtf gf_rsqrt // newer C libraries declare one of their own
template <class T> static inline T __ldg(const T *p) { return *p; }

static inline int __dp4a(int a, int b, int sum) {
    for (int byte = 0; byte < 4; byte++)
        sum += (int)(int8_t)(a >> 8 * byte) * (int)(int8_t)(b >> 8 * byte);
    return sum;
}

// ---- what threads do together; `site` is the source line, the same for all that meet

static void gf_wait_block(int site);
static void gf_wait_warp(int site);
static void *gf_lane_slot(int lane); // 8 bytes per lane of the running warp
static int gf_lane();

#define __syncthreads() gf_wait_block(__LINE__)
#define __syncwarp(...) gf_wait_warp(__LINE__)

template <class T> static T gf_shuffle(T value, int from, int site) {
    static_assert(sizeof(T) <= 8, "a lane's slot holds 8 bytes");
    T result;
    memcpy(gf_lane_slot(gf_lane()), &value, sizeof value);
    gf_wait_warp(site);
    memcpy(&result, gf_lane_slot(from), sizeof result);
    gf_wait_warp(-site); // nobody writes the slots again before all have read
    return result;
}
static inline int gf_within(int from, int width, int own) {
    return from / width == own / width ? from : own;
}
#define __shfl_sync(mask, value, lane, width)                                                      \
    gf_shuffle((value), gf_lane() / (width) * (width) + (lane) % (width), __LINE__)
#define __shfl_xor_sync(mask, value, bits, width)                                                  \
    gf_shuffle((value), gf_within(gf_lane() ^ (bits), (width), gf_lane()), __LINE__)
#define __shfl_down_sync(mask, value, distance, width)                                             \
    gf_shuffle((value), gf_within(gf_lane() + (distance), (width), gf_lane()), __LINE__)
#define __shfl_up_sync(mask, value, distance, width)                                               \
    gf_shuffle((value), gf_within(gf_lane() - (distance) < 0 ? gf_lane() : gf_lane() - (distance), \
                                  (width), gf_lane()), __LINE__)
#define __activemask() 0xffffffffu
