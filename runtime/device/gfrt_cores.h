/* Big and LITTLE CPUs; of the runtime, and of gfbench. */
#ifndef GFRT_CORES_H
#define GFRT_CORES_H

#include <sched.h>
#include <stdbool.h>

#define GFI_CPUS "/sys/devices/system/cpu"

/* Takes those CPUs away from `set` that can do much less than its best ones. `root` is GFI_CPUS.
 * Where the system does not say what CPUs can do, all stay. */
void gfi_keep_big(const char *root, cpu_set_t *set);

#endif
