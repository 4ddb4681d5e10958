/* peak [N]: what N cores at once (default: one) can do at most, in G operations per second:
 * independent multiply-adds, no memory. */
#include <cpuid.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#define EACH(X)                                                                                    \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define FMA512(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n\t"
#define VNNI512(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n\t"
/* Of 16 registers two are operands; 14 sums hide the latency as well. */
#define FMA256(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define CLOBBERED                                                                                  \
    "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",       \
        "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

#define MAX_THREADS 256
static int threads = 1;
static atomic_int waiting;

/* All threads go on together, without a call to the system. */
static void meet(int *met) {
    atomic_fetch_add(&waiting, 1);
    for (*met += threads; atomic_load(&waiting) < *met;)
        __builtin_ia32_pause();
}

/* The best of five: nothing but another program can make it slower. The first thread's clock runs
 * until the last one is done. */
#define MEASURE(kind, operations, ...)                                                             \
    do {                                                                                           \
        double best = 1e9;                                                                         \
        for (int attempt = 0; attempt < 5; attempt++) {                                            \
            meet(&met);                                                                            \
            double start = now();                                                                  \
            for (long i = 0; i < 100000; i++)                                                      \
                __asm__ volatile(__VA_ARGS__);                                                     \
            meet(&met);                                                                            \
            double took = now() - start;                                                           \
            best = took < best ? took : best;                                                      \
        }                                                                                          \
        if (first)                                                                                 \
            printf("%s %.1f\n", kind, threads * 100000.0 * (operations) / best * 1e-9);            \
    } while (0)

static void set_tiles(void) {
    _Alignas(64) uint8_t config[64] = {1};
    for (int t = 0; t < 8; t++) {
        config[16 + 2 * t] = 64;
        config[48 + t] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

static void *measure(void *first) {
    int met = 0;
    uint32_t eax, ebx, ecx, edx; /* Intel SDM, CPUID, leaf 7 */
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
        return NULL;
    if (ebx >> 16 & 1) {
        __asm__ volatile("vpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31" ::
                             : "xmm14", "xmm15");
        MEASURE("float32", 16 * 32, EACH(FMA512)::: CLOBBERED);
    } else if (ebx >> 5 & 1) {
        __asm__ volatile("vxorps %%ymm14, %%ymm14, %%ymm14\n\tvxorps %%ymm15, %%ymm15, %%ymm15" ::
                             : CLOBBERED);
        MEASURE("float32", 14 * 16,
                FMA256(0) FMA256(1) FMA256(2) FMA256(3) FMA256(4) FMA256(5) FMA256(6) FMA256(7)
                    FMA256(8) FMA256(9) FMA256(10) FMA256(11) FMA256(12) FMA256(13)::
                        : CLOBBERED);
    }
    if (ecx >> 11 & 1)
        MEASURE("vnni", 16 * 128, EACH(VNNI512)::: CLOBBERED);
    /* The kernel refuses where there are no tiles. */
    if (edx >> 25 & 1 && syscall(SYS_arch_prctl, 0x1023, 18) == 0) {
        set_tiles();
        MEASURE("amx", 4 * 2 * 16 * 16 * 64,
                "tdpbusd %%tmm6, %%tmm4, %%tmm0\n\ttdpbusd %%tmm7, %%tmm4, %%tmm1\n\t"
                "tdpbusd %%tmm6, %%tmm5, %%tmm2\n\ttdpbusd %%tmm7, %%tmm5, %%tmm3" ::: "memory");
        __asm__ volatile("tilerelease");
    }
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t others[MAX_THREADS];
    threads = argc > 1 ? atoi(argv[1]) : 1;
    if (threads < 1 || threads > MAX_THREADS)
        return 2;
    for (int i = 1; i < threads; i++) {
        if (pthread_create(&others[i], NULL, measure, NULL) != 0)
            return 1;
    }
    measure(others); /* any address but null */
    for (int i = 1; i < threads; i++)
        pthread_join(others[i], NULL);
    return 0;
}
