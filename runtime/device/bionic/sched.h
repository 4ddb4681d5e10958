#ifndef GFRT_BIONIC_SCHED_H
#define GFRT_BIONIC_SCHED_H

#include <stddef.h>

typedef struct {
    unsigned long bits[1024 / (8 * sizeof(unsigned long))];
} cpu_set_t;

int sched_getaffinity(int process, size_t size, cpu_set_t *set);
int __sched_cpucount(size_t size, const cpu_set_t *set);
#define CPU_COUNT(set) __sched_cpucount(sizeof(cpu_set_t), set)

#endif
