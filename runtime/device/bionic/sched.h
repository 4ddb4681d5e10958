#ifndef GFRT_BIONIC_SCHED_H
#define GFRT_BIONIC_SCHED_H

#include <stddef.h>

typedef struct {
    unsigned long bits[1024 / (8 * sizeof(unsigned long))];
} cpu_set_t;

int sched_yield(void);
int sched_getaffinity(int process, size_t size, cpu_set_t *set);
int sched_setaffinity(int process, size_t size, const cpu_set_t *set);
int __sched_cpucount(size_t size, const cpu_set_t *set);
#define CPU_COUNT(set) __sched_cpucount(sizeof(cpu_set_t), set)

#define CPU_SETSIZE 1024
#define CPU_WORD(cpu, set) (set)->bits[(size_t)(cpu) / (8 * sizeof(unsigned long))]
#define CPU_BIT(cpu) (1ul << (size_t)(cpu) % (8 * sizeof(unsigned long)))
#define CPU_ISSET(cpu, set) ((CPU_WORD(cpu, set) & CPU_BIT(cpu)) != 0)
#define CPU_CLR(cpu, set) ((void)(CPU_WORD(cpu, set) &= ~CPU_BIT(cpu)))

#endif
