/* Whether this CPU has what the kernels of a bundle need: a clear refusal instead of SIGILL. */
#include <stdlib.h>
#include <string.h>

#include "gfrt_internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define THIS_ARCH GFI_X86_64

enum { EAX, EBX, ECX, EDX };

/* Linux's names; where CPUID shows them (Intel SDM, volume 2A); the XCR0 bits that say that the
 * operating system keeps the registers. */
static const struct {
    const char *name;
    uint32_t leaf, subleaf;
    uint8_t reg, bit;
    uint32_t xcr0;
} FEATURES[] = {
    {"ssse3", 1, 0, ECX, 9, 0},
    {"fma", 1, 0, ECX, 12, 0x6},
    {"sse4_1", 1, 0, ECX, 19, 0},
    {"sse4_2", 1, 0, ECX, 20, 0},
    {"movbe", 1, 0, ECX, 22, 0},
    {"popcnt", 1, 0, ECX, 23, 0},
    {"avx", 1, 0, ECX, 28, 0x6},
    {"f16c", 1, 0, ECX, 29, 0x6},
    {"abm", 0x80000001, 0, ECX, 5, 0},
    {"bmi1", 7, 0, EBX, 3, 0},
    {"avx2", 7, 0, EBX, 5, 0x6},
    {"bmi2", 7, 0, EBX, 8, 0},
    {"avx512f", 7, 0, EBX, 16, 0xe6},
    {"avx512dq", 7, 0, EBX, 17, 0xe6},
    {"avx512ifma", 7, 0, EBX, 21, 0xe6},
    {"avx512cd", 7, 0, EBX, 28, 0xe6},
    {"avx512bw", 7, 0, EBX, 30, 0xe6},
    {"avx512vl", 7, 0, EBX, 31, 0xe6},
    {"avx512vbmi", 7, 0, ECX, 1, 0xe6},
    {"avx512_vbmi2", 7, 0, ECX, 6, 0xe6},
    {"gfni", 7, 0, ECX, 8, 0},
    {"avx512_vnni", 7, 0, ECX, 11, 0xe6},
    {"avx512_bitalg", 7, 0, ECX, 12, 0xe6},
    {"avx512_vpopcntdq", 7, 0, ECX, 14, 0xe6},
    {"amx_bf16", 7, 0, EDX, 22, 0x60000},
    {"avx512_fp16", 7, 0, EDX, 23, 0xe6},
    {"amx_tile", 7, 0, EDX, 24, 0x60000},
    {"amx_int8", 7, 0, EDX, 25, 0x60000},
    {"avx_vnni", 7, 1, EAX, 4, 0x6},
    {"avx512_bf16", 7, 1, EAX, 5, 0xe6},
};

static uint32_t enabled_state(void) {
    uint32_t reg[4] = {0}, low, high;
    if (!__get_cpuid(1, &reg[EAX], &reg[EBX], &reg[ECX], &reg[EDX]) || !(reg[ECX] >> 27 & 1))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool cpu_has(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof FEATURES / sizeof FEATURES[0]; i++) {
        if (strlen(FEATURES[i].name) != length || memcmp(FEATURES[i].name, name, length) != 0)
            continue;
        uint32_t reg[4] = {0};
        if (!__get_cpuid_count(FEATURES[i].leaf, FEATURES[i].subleaf, &reg[EAX], &reg[EBX],
                               &reg[ECX], &reg[EDX]))
            return false;
        return (reg[FEATURES[i].reg] >> FEATURES[i].bit & 1) &&
               (FEATURES[i].xcr0 == 0 ||
                (enabled_state() & FEATURES[i].xcr0) == FEATURES[i].xcr0);
    }
    return false; /* a name that this runtime does not know */
}

/* Linux gives a process the AMX tiles only after it has asked (arch_prctl ARCH_REQ_XCOMP_PERM). */
static bool allow(const char *name) {
    return strncmp(name, "amx_", 4) != 0 || syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

#elif defined(__aarch64__)
#include <sys/auxv.h>

#define THIS_ARCH GFI_AARCH64

/* Linux's names, and their bits in AT_HWCAP (asm/hwcap.h) and, from 64 on, AT_HWCAP2. */
static const struct {
    const char *name;
    uint8_t bit;
} FEATURES[] = {
    {"asimd", 1},    {"crc32", 7},    {"atomics", 8},  {"fphp", 9},
    {"asimdhp", 10}, {"asimdrdm", 12}, {"lrcpc", 15},  {"asimddp", 20},
    {"asimdfhm", 23}, {"i8mm", 64 + 13}, {"bf16", 64 + 14},
};

static bool cpu_has(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof FEATURES / sizeof FEATURES[0]; i++) {
        if (strlen(FEATURES[i].name) == length && memcmp(FEATURES[i].name, name, length) == 0) {
            uint8_t bit = FEATURES[i].bit;
            return getauxval(bit < 64 ? AT_HWCAP : AT_HWCAP2) >> bit % 64 & 1;
        }
    }
    return false;
}

static bool allow(const char *name) {
    (void)name;
    return true;
}

#else
#error "gfrt knows x86_64 and aarch64"
#endif

gfrt_status gfi_check_cpu(const gfi_plan *plan) {
    static const char *const arch_names[] = {"x86_64", "aarch64"};
    uint32_t arch = plan->header->arch;
    if (arch != THIS_ARCH)
        return gfi_fail(GFRT_UNSUPPORTED, "the bundle is for %s, this machine is %s",
                        arch_names[arch], arch_names[THIS_ARCH]);
    const char *name = gfi_string(plan, plan->header->cpu_features);
    for (size_t length; *name; name += length + (name[length] == ' ')) {
        length = strcspn(name, " ");
        if (length > 0 && !(cpu_has(name, length) && allow(name)))
            return gfi_fail(GFRT_UNSUPPORTED,
                            "this CPU lacks %.*s, which the bundle was compiled for: "
                            "compile it for another --target", (int)length, name);
    }
    return GFRT_OK;
}
