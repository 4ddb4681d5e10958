/* big_cpus ROOT COUNT: those of the first COUNT CPUs that are big, by the files under ROOT. */
#include <stdio.h>
#include <stdlib.h>

#include "gfrt_cores.h"

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu = 0; cpu < atoi(argv[2]); cpu++)
        CPU_SET(cpu, &set);
    gfi_keep_big(argv[1], &set);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &set))
            printf("%d\n", cpu);
    }
    return 0;
}
