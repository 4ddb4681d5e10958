/* Walks through gfrt.h, every argument wrong once. Prints nothing where all is as it should be.
 * Linked with the runtime's sources and the toy's kernels under AddressSanitizer. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gfrt.h"

static int failures;

/* The linker sends every allocation of the runtime through these (--wrap). */
static int allocations;
void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
void *__real_mmap(void *at, size_t size, int protection, int flags, int file, long offset);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_aligned_alloc(size_t alignment, size_t size);
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int file, long offset);

void *__wrap_malloc(size_t size) {
    allocations++;
    return __real_malloc(size);
}
void *__wrap_calloc(size_t count, size_t size) {
    allocations++;
    return __real_calloc(count, size);
}
void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    allocations++;
    return __real_aligned_alloc(alignment, size);
}
void *__wrap_mmap(void *at, size_t size, int protection, int flags, int file, long offset) {
    allocations++;
    return __real_mmap(at, size, protection, flags, file, offset);
}

static void expect(gfrt_status want, gfrt_status got, const char *message, int line) {
    if (want == got && (want == GFRT_OK || strstr(gfrt_last_error(), message)))
        return;
    printf("line %d: status %d instead of %d: %s\n", line, got, want, gfrt_last_error());
    failures++;
}

#define EXPECT(want, message, call) expect(want, call, message, __LINE__)

typedef struct {
    gfrt_context *context;
    int calls;
} seen;

static void observe(void *user, size_t step, const char *label, const gfrt_tensor_info *tensor,
                    const void *data) {
    seen *s = user;
    if (step != (size_t)s->calls || !label[0] || !tensor->name[0] || !data)
        failures++;
    s->calls++;
    /* The context is in use: running it from here must be refused, not deadlock. */
    const void *inputs[1] = {data};
    void *outputs[1] = {&s->calls};
    size_t size = 4;
    EXPECT(GFRT_BUSY, "one context per thread", gfrt_run(s->context, inputs, &size, outputs, &size));
}

int main(int argc, char **argv) {
    if (argc != 3)
        return 2;
    gfrt_model *model = NULL, *other = NULL;
    gfrt_context *context = NULL;
    gfrt_tensor_info info;
    gfrt_step_profile profile;

    EXPECT(GFRT_BAD_ARGUMENT, "model is null", gfrt_open(argv[1], 0, NULL));
    EXPECT(GFRT_BAD_ARGUMENT, "bundle is null", gfrt_open(NULL, 0, &model));
    EXPECT(GFRT_BAD_ARGUMENT, "unknown flags 0x40", gfrt_open(argv[1], 0x40, &model));
    EXPECT(GFRT_NOT_FOUND, "is this a bundle?", gfrt_open("/nowhere", 0, &model));
    char *endless = malloc(6000);
    memset(endless, 'x', 5999);
    endless[5999] = 0;
    EXPECT(GFRT_BAD_ARGUMENT, "too long", gfrt_open(endless, 0, &model));
    free(endless);
    EXPECT(GFRT_OK, "", gfrt_open(argv[1], GFRT_VERIFY, &model));
    EXPECT(GFRT_OK, "", gfrt_open(argv[2], 0, &other)); /* with a library of its own */
    if (!strstr(gfrt_last_error(), "too long")) /* of the last call that failed */
        printf("a call that went well says: %s\n", gfrt_last_error()), failures++;

    EXPECT(GFRT_BAD_ARGUMENT, "model is null", gfrt_input_info(NULL, 0, &info));
    EXPECT(GFRT_BAD_ARGUMENT, "info is null", gfrt_output_info(model, 0, NULL));
    EXPECT(GFRT_BAD_ARGUMENT, "there is no input 1", gfrt_input_info(model, 1, &info));
    EXPECT(GFRT_BAD_ARGUMENT, "there is no output 7", gfrt_output_info(model, 7, &info));
    EXPECT(GFRT_OK, "", gfrt_input_info(model, 0, &info));
    failures += strcmp(info.name, "image") != 0 || info.ndim != 4 || info.size_bytes != 768;
    failures += gfrt_input_count(NULL) != 0 || gfrt_output_count(NULL) != 0;
    failures += gfrt_step_count(model) != 4 || strcmp(gfrt_device(model), "cpu") != 0;

    EXPECT(GFRT_BAD_ARGUMENT, "context is null", gfrt_context_create(model, 1, NULL));
    EXPECT(GFRT_BAD_ARGUMENT, "model is null", gfrt_context_create(NULL, 1, &context));
    EXPECT(GFRT_BAD_ARGUMENT, "too many", gfrt_context_create(model, 100000, &context));
    EXPECT(GFRT_OK, "", gfrt_context_create(model, 3, &context));

    static uint8_t pixels[192];
    static float image[192], logits[16], again[16];
    for (int i = 0; i < 192; i++)
        pixels[i] = (uint8_t)(i * 7);
    EXPECT(GFRT_BAD_ARGUMENT, "a pointer is null",
           gfrt_normalize_u8(model, 0, NULL, 192, image, sizeof image));
    EXPECT(GFRT_BAD_ARGUMENT, "no RGB image",
           gfrt_normalize_u8(model, 1, pixels, 192, image, sizeof image));
    EXPECT(GFRT_BAD_ARGUMENT, "8 x 8 pixels",
           gfrt_normalize_u8(model, 0, pixels, 191, image, sizeof image));
    EXPECT(GFRT_OK, "", gfrt_normalize_u8(model, 0, pixels, 192, image, sizeof image));

    const void *inputs[1] = {image}, *none[1] = {NULL};
    void *outputs[1] = {logits};
    size_t in_size = sizeof image, out_size = sizeof logits, wrong = 3;
    EXPECT(GFRT_BAD_ARGUMENT, "a pointer is null",
           gfrt_run(NULL, inputs, &in_size, outputs, &out_size));
    EXPECT(GFRT_BAD_ARGUMENT, "input 0 is null",
           gfrt_run(context, none, &in_size, outputs, &out_size));
    EXPECT(GFRT_BAD_ARGUMENT, "input 0 (image) has 768 bytes, got 3",
           gfrt_run(context, inputs, &wrong, outputs, &out_size));
    EXPECT(GFRT_BAD_ARGUMENT, "output 0 (logits) has 64 bytes, got 3",
           gfrt_run(context, inputs, &in_size, outputs, &wrong));

    EXPECT(GFRT_BAD_ARGUMENT, "context is null", gfrt_set_observer(NULL, observe, NULL));
    EXPECT(GFRT_BAD_ARGUMENT, "context is null", gfrt_profile_enable(NULL, 1));
    EXPECT(GFRT_BAD_ARGUMENT, "there is no step 4", gfrt_profile_get(context, 4, &profile));
    seen s = {context, 0};
    EXPECT(GFRT_OK, "", gfrt_set_observer(context, observe, &s));
    EXPECT(GFRT_OK, "", gfrt_profile_enable(context, 1));
    int before = allocations;
    EXPECT(GFRT_OK, "", gfrt_run(context, inputs, &in_size, outputs, &out_size));
    if (before == 0 || allocations != before)
        printf("%d allocations, %d before the run\n", allocations, before), failures++;
    EXPECT(GFRT_OK, "", gfrt_set_observer(context, NULL, NULL));
    EXPECT(GFRT_OK, "", gfrt_profile_get(context, 1, &profile));
    failures += s.calls != 4 || profile.calls != 1 || strcmp(profile.label, "stem.mix") != 0;

    /* The context keeps its model alive; the other model runs through this library, too. */
    gfrt_close(model);
    outputs[0] = again;
    EXPECT(GFRT_OK, "", gfrt_run(context, inputs, &in_size, outputs, &out_size));
    failures += memcmp(logits, again, sizeof logits) != 0;
    gfrt_context_destroy(context);
    EXPECT(GFRT_OK, "", gfrt_context_create(other, 2, &context));
    EXPECT(GFRT_OK, "", gfrt_run(context, inputs, &in_size, outputs, &out_size));
    failures += memcmp(logits, again, sizeof logits) == 0;
    gfrt_context_destroy(context);
    gfrt_close(other);
    gfrt_close(NULL);
    gfrt_context_destroy(NULL);
    if (failures)
        printf("%d failures\n", failures);
    return failures != 0;
}
