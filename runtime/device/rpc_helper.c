/* Runs shell scripts on a board of a TVM RPC fleet.
 *
 * TVM's RPC server keeps files and loads libraries, and starts no programs. This library is one that
 * it can load: its functions follow TVM's calling convention, as our kernels do. It runs
 * `command.sh` of the folder that it lies in, one at a time, and the script dies with the server's
 * session, also when the client is gone. */
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gfrt_internal.h"

#define EXPORT __attribute__((visibility("default")))
#define TYPE_INT 1 /* kTVMFFIInt */
#define NOT_STARTED (-2)
#define RUNNING (-1)

static pid_t child;

static int32_t give(gfi_any *result, int64_t value) {
    result->type_index = TYPE_INT;
    result->padding = 0;
    result->value.integer = value;
    return 0;
}

static int open_for_writing(const char *name) {
    return open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
}

static void run_script(const char *folder) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int out, err, in = open("/dev/null", O_RDONLY);
    if (chdir(folder) != 0 || (out = open_for_writing("command.out")) < 0 ||
        (err = open_for_writing("command.err")) < 0)
        _exit(126);
    dup2(in, 0);
    dup2(out, 1);
    dup2(err, 2);
    execl("/bin/sh", "sh", "command.sh", (char *)NULL);
    execl("/system/bin/sh", "sh", "command.sh", (char *)NULL); /* Android */
    _exit(127);
}

EXPORT int32_t __tvm_ffi_gfcompile_start(void *self, const gfi_any *args, int32_t count,
                                         gfi_any *result);
EXPORT int32_t __tvm_ffi_gfcompile_status(void *self, const gfi_any *args, int32_t count,
                                          gfi_any *result);
EXPORT int32_t __tvm_ffi_gfcompile_stop(void *self, const gfi_any *args, int32_t count,
                                        gfi_any *result);

/* Starts the script: 0, or NOT_STARTED. */
int32_t __tvm_ffi_gfcompile_start(void *self, const gfi_any *args, int32_t count,
                                  gfi_any *result) {
    (void)self;
    (void)args;
    (void)count;
    static char folder[4096]; /* of this library */
    Dl_info info;
    if (child || !dladdr((void *)__tvm_ffi_gfcompile_start, &info) || !info.dli_fname ||
        strlen(info.dli_fname) >= sizeof folder)
        return give(result, NOT_STARTED);
    strcpy(folder, info.dli_fname);
    char *end = strrchr(folder, '/');
    if (!end)
        return give(result, NOT_STARTED);
    *end = 0;
    child = fork();
    if (child == 0)
        run_script(folder);
    if (child < 0)
        child = 0;
    return give(result, child ? 0 : NOT_STARTED);
}

/* Its exit status as a shell gives it, once it has ended; RUNNING or NOT_STARTED. */
int32_t __tvm_ffi_gfcompile_status(void *self, const gfi_any *args, int32_t count,
                                   gfi_any *result) {
    (void)self;
    (void)args;
    (void)count;
    int status;
    if (!child)
        return give(result, NOT_STARTED);
    pid_t ended = waitpid(child, &status, WNOHANG);
    if (ended == 0)
        return give(result, RUNNING);
    child = 0;
    if (ended < 0)
        return give(result, NOT_STARTED);
    return give(result, WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
}

/* Ends it. */
int32_t __tvm_ffi_gfcompile_stop(void *self, const gfi_any *args, int32_t count,
                                 gfi_any *result) {
    (void)self;
    (void)args;
    (void)count;
    if (child) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
        child = 0;
    }
    return give(result, 0);
}
