// Runs the threads of a CUDA block as fibers of one CPU thread, with the barriers of a real GPU.
//
// Included after the kernels, in the same file. A block's threads run one after another, each up
// to its next barrier. Found out on the way: a barrier that not all threads reach, or that they
// reach at different places; an access outside of any allocation (guard pages lie around each).
// Threads may run in descending order instead (GFCOMPILE_STANDIN_ORDER=reverse): where a barrier
// is missing, one of the two orders reads what is not yet written.
#pragma once
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "kernel_library.h"

enum { GF_WARP = 32, GF_MAX_THREADS = 1024, GF_STACK = 64 << 10, GF_GUARD = 64 << 10 };

// Saves the registers that a called function must keep, and the stack pointer; takes on another's.
extern "C" __attribute__((visibility("hidden"))) void gf_switch(void **save, void *resume);
#if defined(__x86_64__)
asm(R"(
.text
.hidden gf_switch
.globl gf_switch
.type gf_switch, @function
gf_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
.size gf_switch, .-gf_switch
)");
enum { GF_FRAME = 8, GF_RETURN = 6 }; // words of a fresh stack; where the return address lies
#elif defined(__aarch64__)
asm(R"(
.text
.hidden gf_switch
.globl gf_switch
.type gf_switch, %function
gf_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size gf_switch, .-gf_switch
)");
enum { GF_FRAME = 20, GF_RETURN = 11 };
#else
#error "fibers are written for x86-64 and aarch64"
#endif

enum GfState : unsigned char { GF_READY, GF_AT_BLOCK, GF_AT_WARP, GF_DONE };

struct GfFiber {
    void *stack_pointer;
    GfState state;
    int site;
    Dim3 index;
};

static GfFiber gf_fibers[GF_MAX_THREADS];
static char *gf_stacks;
static int gf_current = -1; // -1: the scheduler runs
static void *gf_scheduler;
static void (*gf_kernel)(void **);
static void **gf_arguments;
static uint64_t gf_slots[GF_MAX_THREADS];
static volatile bool gf_faulted;
static void *gf_fault_address;

extern "C" char __start_gf_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_gf_shared[] __attribute__((weak, visibility("hidden")));

static void gf_wait(GfState state, int site) {
    GfFiber *fiber = &gf_fibers[gf_current];
    fiber->state = state;
    fiber->site = site;
    gf_switch(&fiber->stack_pointer, gf_scheduler);
}
static void gf_wait_block(int site) { gf_wait(GF_AT_BLOCK, site); }
static void gf_wait_warp(int site) { gf_wait(GF_AT_WARP, site); }
static int gf_lane() { return gf_current % GF_WARP; }
static void *gf_lane_slot(int lane) { return &gf_slots[gf_current / GF_WARP * GF_WARP + lane]; }

static void gf_fiber_main() {
    gf_kernel(gf_arguments);
    gf_wait(GF_DONE, 0);
    abort(); // a finished fiber is never resumed
}

// A fault inside a kernel ends the launch, not the process.
static void gf_on_fault(int number, siginfo_t *info, void *) {
    if (gf_current < 0) { // not ours: let it happen again, and kill
        signal(number, SIG_DFL);
        return;
    }
    gf_faulted = true;
    gf_fault_address = info->si_addr;
    void *abandoned;
    gf_switch(&abandoned, gf_scheduler);
}

static void gf_prepare(int thread, Dim3 block) {
    GfFiber *fiber = &gf_fibers[thread];
    unsigned index = (unsigned)thread;
    fiber->index = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
    fiber->state = GF_READY;
    // Stacks start at different cache sets, or a thousand of them would share one.
    char *top = gf_stacks + (size_t)(thread + 1) * (GF_STACK + GF_GUARD) - thread % 61 * 64;
    void **words = (void **)top - GF_FRAME;
    memset(words, 0, GF_FRAME * sizeof *words);
    words[GF_RETURN] = (void *)gf_fiber_main;
    fiber->stack_pointer = words;
}

static void gf_resume(int thread) {
    gf_current = thread;
    threadIdx = gf_fibers[thread].index;
    gf_switch(&gf_scheduler, gf_fibers[thread].stack_pointer);
    gf_current = -1;
}

// How many of the fibers [first, end) are in `state`; all of them at one place if *same.
static int gf_count(int first, int end, GfState state, bool *same) {
    int count = 0, site = 0;
    *same = true;
    for (int i = first; i < end; i++) {
        if (gf_fibers[i].state != state)
            continue;
        if (count++ && gf_fibers[i].site != site)
            *same = false;
        site = gf_fibers[i].site;
    }
    return count;
}

static void gf_release(int first, int end) {
    for (int i = first; i < end; i++)
        gf_fibers[i].state = GF_READY;
}

static int gf_diverged(const char *name, const char *what, int arrived, int threads, bool same) {
    fprintf(stderr, "stand-in: %s: block (%u, %u, %u): %d of %d threads wait at %s\n", name,
            blockIdx.x, blockIdx.y, blockIdx.z, arrived, threads,
            same ? what : "different barriers");
    return GF_LAUNCH_FAILED;
}

// Runs the fibers of one warp until all wait for the block or are done.
static int gf_run_warp(const char *name, int first, int end, bool reverse) {
    for (;;) {
        for (int i = 0; i < end - first; i++) {
            int thread = reverse ? end - 1 - i : first + i;
            if (gf_fibers[thread].state != GF_READY)
                continue;
            gf_resume(thread);
            if (gf_faulted) {
                Dim3 t = gf_fibers[thread].index;
                fprintf(stderr,
                        "stand-in: %s: block (%u, %u, %u) thread (%u, %u, %u): access to %p, "
                        "outside of any allocation\n",
                        name, blockIdx.x, blockIdx.y, blockIdx.z, t.x, t.y, t.z, gf_fault_address);
                return GF_ILLEGAL_ADDRESS;
            }
        }
        bool same;
        int waiting = gf_count(first, end, GF_AT_WARP, &same);
        if (!waiting)
            return 0;
        if (waiting != end - first || !same)
            return gf_diverged(name, "a warp's barrier", waiting, end - first, same);
        gf_release(first, end);
    }
}

static int gf_run_block(const char *name, int threads, Dim3 block, bool reverse) {
    if (__start_gf_shared) // so that what a block does not write itself reads as NaN
        memset(__start_gf_shared, 0xff, (size_t)(__stop_gf_shared - __start_gf_shared));
    for (int i = 0; i < threads; i++)
        gf_prepare(i, block);
    int warps = (threads + GF_WARP - 1) / GF_WARP;
    for (;;) {
        for (int i = 0; i < warps; i++) {
            int first = (reverse ? warps - 1 - i : i) * GF_WARP;
            int end = first + GF_WARP < threads ? first + GF_WARP : threads;
            if (int status = gf_run_warp(name, first, end, reverse))
                return status;
        }
        bool same;
        int waiting = gf_count(0, threads, GF_AT_BLOCK, &same);
        if (!waiting)
            return 0;
        if (waiting != threads || !same)
            return gf_diverged(name, "a block's barrier", waiting, threads, same);
        gf_release(0, threads);
    }
}

static int gf_launch(const char *name, void (*kernel)(void **), void **arguments,
                     const unsigned *grid, const unsigned *block) {
    const char *order = getenv("GFCOMPILE_STANDIN_ORDER");
    bool reverse = order && !strcmp(order, "reverse");
    if (!gf_stacks) {
        size_t size = (size_t)GF_MAX_THREADS * (GF_STACK + GF_GUARD);
        void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED)
            return GF_LAUNCH_FAILED;
        gf_stacks = (char *)pages;
        for (int i = 0; i < GF_MAX_THREADS; i++)
            mprotect(gf_stacks + (size_t)i * (GF_STACK + GF_GUARD), GF_GUARD, PROT_NONE);
    }
    static char handler_stack[64 << 10];
    stack_t own_stack = {}, old_stack;
    own_stack.ss_sp = handler_stack;
    own_stack.ss_size = sizeof handler_stack;
    struct sigaction own = {}, old_segv, old_bus;
    own.sa_sigaction = gf_on_fault;
    own.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaltstack(&own_stack, &old_stack);
    sigaction(SIGSEGV, &own, &old_segv);
    sigaction(SIGBUS, &own, &old_bus);

    gf_kernel = kernel;
    gf_arguments = arguments;
    gf_faulted = false;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    int threads = (int)(block[0] * block[1] * block[2]);
    int status = 0;
    for (unsigned z = 0; z < grid[2] && !status; z++)
        for (unsigned y = 0; y < grid[1] && !status; y++)
            for (unsigned x = 0; x < grid[0] && !status; x++) {
                blockIdx = {x, y, z};
                status = gf_run_block(name, threads, blockDim, reverse);
            }

    sigaction(SIGSEGV, &old_segv, NULL);
    sigaction(SIGBUS, &old_bus, NULL);
    sigaltstack(&old_stack, NULL);
    return status;
}
