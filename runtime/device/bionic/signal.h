#ifndef GFRT_BIONIC_SIGNAL_H
#define GFRT_BIONIC_SIGNAL_H

#define SIGILL 4
#define SIGTRAP 5
#define SIGBUS 7
#define SIGFPE 8
#define SIGSEGV 11
#define SIGPROF 27
#define SIGSYS 31
#define SIG_BLOCK 0
#define SIG_SETMASK 2

/* bits/signal_types.h, LP64: the kernel's own */
typedef struct {
    unsigned long sig[1];
} sigset_t;

int sigfillset(sigset_t *set);
int sigdelset(sigset_t *set, int signal);
int pthread_sigmask(int how, const sigset_t *set, sigset_t *before);

#endif
