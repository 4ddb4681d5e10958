/* What applications do around an inference: they fork, wait for signals, round in another way, trap
 * exceptions of floating point, and take an observer away from within. Prints nothing where all is
 * as it should be. The first step of the bundle writes two tensors. */
#include <fenv.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "gfrt.h"

#define THREADS 3
#define DENORMALS_ARE_ZERO 0x8040u /* of MXCSR: results, too */

static int failures;

static void expect(int is_true, const char *what, int number) {
    if (is_true)
        return;
    printf("%s (%d): %s\n", what, number, gfrt_last_error());
    failures++;
}

/* All that an inference writes, byte by byte. */
typedef struct {
    unsigned char bytes[8192];
    size_t size;
} written;

static void keep(void *user, size_t step, const char *label, const gfrt_tensor_info *tensor,
                 const void *data) {
    written *w = user;
    (void)step, (void)label;
    if (w->size + tensor->size_bytes > sizeof w->bytes)
        abort();
    memcpy(w->bytes + w->size, data, tensor->size_bytes);
    w->size += tensor->size_bytes;
}

static gfrt_status infer(gfrt_context *context, const float *image, float *logits) {
    const void *inputs[1] = {image};
    void *outputs[1] = {logits};
    size_t in_size = 192 * sizeof *image, out_size = 16 * sizeof *logits;
    return gfrt_run(context, inputs, &in_size, outputs, &out_size);
}

static written trace(gfrt_context *context, const float *image) {
    static written w;
    float logits[16];
    w.size = 0;
    expect(gfrt_set_observer(context, keep, &w) == GFRT_OK, "set_observer", 0);
    expect(infer(context, image, logits) == GFRT_OK, "run", 0);
    expect(gfrt_set_observer(context, NULL, NULL) == GFRT_OK, "set_observer", 1);
    return w;
}

static gfrt_context *make(gfrt_model *model, uint32_t threads) {
    gfrt_context *context = NULL;
    if (gfrt_context_create(model, threads, &context) != GFRT_OK)
        exit(2);
    return context;
}

static void rest(long microseconds) {
    struct timespec time = {0, 1000 * microseconds};
    nanosleep(&time, NULL);
}

/* ---- forks ---- */

static void check_forks(gfrt_model *model, const float *image) {
    float expected[16];
    gfrt_context *context = make(model, THREADS);
    expect(infer(context, image, expected) == GFRT_OK, "run", 0);
    for (int round = 0; round < 20; round++) {
        rest(round % 4 * 150); /* workers look for work, fall asleep, or sleep */
        pid_t child = fork();
        if (child == 0) {
            float logits[16] = {0};
            alarm(20);
            int good = infer(context, image, logits) == GFRT_OK &&
                       memcmp(logits, expected, sizeof logits) == 0;
            gfrt_context_destroy(context);
            gfrt_context *own = make(model, THREADS); /* with threads of its own */
            good = good && infer(own, image, logits) == GFRT_OK &&
                   memcmp(logits, expected, sizeof logits) == 0;
            gfrt_context_destroy(own);
            gfrt_close(model);
            _exit(good ? 0 : 1);
        }
        int status = 0;
        waitpid(child, &status, 0);
        expect(status == 0, "a fork's inference", status);
        float logits[16];
        expect(infer(context, image, logits) == GFRT_OK &&
                   memcmp(logits, expected, sizeof logits) == 0,
               "an inference after a fork", round);
    }
    gfrt_context_destroy(context);
}

/* ---- signals ---- */

static void check_signals(gfrt_model *model, const float *image) {
    float logits[16];
    gfrt_context *context = make(model, THREADS);
    expect(infer(context, image, logits) == GFRT_OK, "run", 0);
    sigset_t set, before;
    sigemptyset(&set);
    pthread_sigmask(SIG_BLOCK, &set, &before);
    expect(!sigismember(&before, SIGUSR1), "a signal that was not blocked before", SIGUSR1);
    sigaddset(&set, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    kill(getpid(), SIGUSR1); /* for whoever does not block it, whom it ends */
    rest(20000);
    struct timespec second = {1, 0};
    expect(sigtimedwait(&set, NULL, &second) == SIGUSR1, "a signal that was waited for", SIGUSR1);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    gfrt_context_destroy(context);
}

/* ---- floating point ---- */

typedef struct {
    int rounding;
    unsigned bits; /* of MXCSR */
    int traps;
} float_mode;

static void set_mode(const float_mode *mode) {
    fesetenv(FE_DFL_ENV);
    fesetround(mode->rounding);
    __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | mode->bits);
    feenableexcept(mode->traps);
}

static void check_float_modes(gfrt_model *model) {
    static const float_mode usual = {FE_TONEAREST, 0, 0};
    static const float_mode modes[] = {
        {FE_UPWARD, 0, 0},
        {FE_TOWARDZERO, 0, 0},
        {FE_TONEAREST, DENORMALS_ARE_ZERO, 0},
        {FE_TONEAREST, 0, FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW},
    };
    static uint8_t pixels[192];
    static float image[192], again[192], hard[192];
    gfrt_context *early[2] = {make(model, 1), make(model, THREADS)};
    for (int i = 0; i < 192; i++)
        pixels[i] = (uint8_t)(i * 7);
    expect(gfrt_normalize_u8(model, 0, pixels, 192, image, sizeof image) == GFRT_OK, "image", 0);
    for (int i = 0; i < 192; i++) /* denormals, infinities, and values between */
        hard[i] = i < 64 ? image[i] * 1e-39f : i < 128 ? copysignf(INFINITY, image[i])
                                                 : image[i];
    const written expected = trace(early[0], hard);
    for (size_t m = 0; m < sizeof modes / sizeof modes[0]; m++) {
        set_mode(&modes[m]);
        unsigned before = __builtin_ia32_stmxcsr();
        gfrt_context *contexts[] = {early[0], early[1], make(model, 1), make(model, THREADS)};
        for (int c = 0; c < 4; c++) {
            written got = trace(contexts[c], hard);
            expect(memcmp(got.bytes, expected.bytes, expected.size) == 0, "a mode changes results",
                   (int)m * 10 + c);
        }
        expect(gfrt_normalize_u8(model, 0, pixels, 192, again, sizeof again) == GFRT_OK &&
                   memcmp(again, image, sizeof image) == 0,
               "a mode changes an image", (int)m);
        expect(__builtin_ia32_stmxcsr() == before, "the mode was left changed", (int)m);
        set_mode(&usual);
        gfrt_context_destroy(contexts[2]);
        gfrt_context_destroy(contexts[3]);
    }
    gfrt_context_destroy(early[0]);
    gfrt_context_destroy(early[1]);
}

/* ---- observers ---- */

typedef struct {
    gfrt_context *context;
    int calls;
} seen;

static void observe_once(void *user, size_t step, const char *label,
                         const gfrt_tensor_info *tensor, const void *data) {
    seen *s = user;
    (void)step, (void)label, (void)tensor, (void)data;
    s->calls++;
    gfrt_set_observer(s->context, NULL, NULL);
}

static void check_observer(gfrt_model *model, const float *image) {
    float logits[16];
    seen s = {make(model, 1), 0};
    expect(gfrt_set_observer(s.context, observe_once, &s) == GFRT_OK, "set_observer", 0);
    expect(infer(s.context, image, logits) == GFRT_OK, "run", 0);
    expect(s.calls == 1, "an observer that was taken away is called", s.calls);
    gfrt_context_destroy(s.context);
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    static float image[192];
    for (int i = 0; i < 192; i++)
        image[i] = sinf((float)i);
    gfrt_model *model;
    if (gfrt_open(argv[1], 0, &model) != GFRT_OK)
        return 2;
    if (strcmp(argv[2], "forks") == 0)
        check_forks(model, image);
    else if (strcmp(argv[2], "signals") == 0)
        check_signals(model, image);
    else if (strcmp(argv[2], "floats") == 0)
        check_float_modes(model);
    else
        check_observer(model, image);
    gfrt_close(model);
    return failures != 0;
}
