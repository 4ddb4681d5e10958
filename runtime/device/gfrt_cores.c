/* Which CPUs are the big ones: a loop cut into equal parts takes as long as its slowest part. */
#include <stdio.h>

#include "gfrt_cores.h"

/* What a CPU can do, and the percentage of the best one's that a big one has at least. Linux knows
 * capacities where cores differ in kind (prime cores 1024, big ones 600 to 900, LITTLE ones 150 to
 * 500); older systems have but the clocks, of which LITTLE cores have at most four fifths. */
static const struct {
    const char *file;
    long least_percent;
} MEASURES[] = {{"cpu_capacity", 55}, {"cpufreq/cpuinfo_max_freq", 81}};

/* The number in root/cpu<cpu>/file; 0 if there is none. */
static long read_number(const char *root, int cpu, const char *file) {
    char path[512], text[10];
    int length = snprintf(path, sizeof path, "%s/cpu%d/%s", root, cpu, file);
    FILE *from = length > 0 && (size_t)length < sizeof path ? fopen(path, "rb") : NULL;
    if (!from)
        return 0;
    text[fread(text, 1, 9, from)] = 0; /* nine digits fit a long */
    fclose(from);
    long value = 0;
    for (const char *at = text; *at >= '0' && *at <= '9'; at++)
        value = 10 * value + (*at - '0');
    return value;
}

void gfi_keep_big(const char *root, cpu_set_t *set) {
    for (size_t m = 0; m < sizeof MEASURES / sizeof MEASURES[0]; m++) {
        long most = 0, values[CPU_SETSIZE];
        bool all = true;
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            values[cpu] = CPU_ISSET(cpu, set) ? read_number(root, cpu, MEASURES[m].file) : 0;
            all = all && (values[cpu] > 0 || !CPU_ISSET(cpu, set));
            most = values[cpu] > most ? values[cpu] : most;
        }
        if (!all)
            continue;
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            /* Divided first: a clock in kHz times a hundred may be too much for 32 bits. */
            if (CPU_ISSET(cpu, set) && values[cpu] < most / 100 * MEASURES[m].least_percent)
                CPU_CLR(cpu, set);
        }
        return;
    }
}
