// What the stand-in driver finds in a library of kernels compiled for the CPU.
#pragma once

struct GfKernel {
    const char *name;
    unsigned parameters; // pointers, all of them
    unsigned threads;    // of a block, as __launch_bounds__ has it
    void (*run)(void **arguments);
};

// CUDA's codes for a kernel that accessed unmapped memory, and for one that failed otherwise.
enum { GF_ILLEGAL_ADDRESS = 700, GF_LAUNCH_FAILED = 719 };

extern "C" {
// Ends with an entry without a name.
typedef const GfKernel *GfKernelTable;
// Runs all blocks of a launch; returns a CUDA error code.
typedef int GfLaunch(const GfKernel *kernel, void **arguments, const unsigned *grid,
                     const unsigned *block);
}
