/* gfrt: runs a compiled model from its bundle folder.
 *
 *     gfrt_model *model;
 *     gfrt_context *context;
 *     if (gfrt_open("bundle", 0, &model) || gfrt_context_create(model, 1, &context))
 *         fprintf(stderr, "%s\n", gfrt_last_error());
 *     gfrt_run(context, inputs, input_sizes, outputs, output_sizes);
 *
 * A model is read-only and may be shared by threads: its weights are mapped from the file once.
 * A context holds what one inference needs, its activations and its worker threads: give each
 * thread its own. Several models may be open at once. A fork of the process may go on with what is
 * open, if no GPU is, and on the calling thread alone.
 *
 * The program stays as it was: worker threads get none of its signals, and floating point rounds to
 * nearest, keeps denormals and traps nothing during a call, whatever the calling thread has set.
 *
 * Every function that can fail returns a status and leaves one line for gfrt_last_error(); a
 * pointer that it was to set is null then. Sizes are in bytes, times in seconds.
 * Memory is allocated by gfrt_open, gfrt_context_create and gfrt_set_observer, never by gfrt_run;
 * on Android, 520 bytes more by the first call on each thread.
 */
#ifndef GFRT_H
#define GFRT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GFRT_API __attribute__((visibility("default")))

typedef struct gfrt_model gfrt_model;
typedef struct gfrt_context gfrt_context;

typedef enum gfrt_status {
    GFRT_OK = 0,
    GFRT_BAD_ARGUMENT = 1, /* a null pointer, an index out of range, a wrong size */
    GFRT_NOT_FOUND = 2,    /* a file is missing or cannot be read */
    GFRT_DAMAGED = 3,      /* a file is not what it should be */
    GFRT_TOO_NEW = 4,      /* the bundle was written by a newer gfcompile */
    GFRT_UNSUPPORTED = 5,  /* this CPU, GPU or driver cannot run the bundle */
    GFRT_NO_MEMORY = 6,
    GFRT_BUSY = 7,         /* another thread is using this context */
    GFRT_FAILED = 8        /* a kernel or the driver reported an error */
} gfrt_status;

typedef enum gfrt_dtype {
    GFRT_FLOAT32 = 0,
    GFRT_INT8 = 1,
    GFRT_UINT8 = 2,
    GFRT_INT32 = 3,
    GFRT_UINT16 = 4,
    GFRT_INT64 = 5,
    GFRT_BOOL = 6,
    GFRT_INT16 = 7,
    GFRT_FLOAT16 = 8
} gfrt_dtype;

#define GFRT_MAX_DIMS 6

/* A tensor: dense, row-major. The image is (batch, 3, height, width) of float32, the logits are
 * (batch, classes). Where scale is not 0 the values are quantized:
 * real = (stored - storage_offset - zero_point) * scale. */
typedef struct gfrt_tensor_info {
    const char *name; /* lives as long as the model */
    gfrt_dtype dtype;
    int32_t ndim;
    int64_t shape[GFRT_MAX_DIMS]; /* the first ndim; the others are 0 */
    size_t size_bytes;
    float scale;
    int32_t zero_point;
    int32_t storage_offset;
} gfrt_tensor_info;

/* The version of this runtime, such as "1.0". */
GFRT_API const char *gfrt_version(void);

/* What went wrong in the last call that failed on this thread; "" before that. It lasts until the
 * next one fails there. */
GFRT_API const char *gfrt_last_error(void);

#define GFRT_VERIFY 1u /* gfrt_open: compare the SHA-256 of the weights, too */

/* gfrt_open: of a bundle for several kinds of CPU, take the kernels of level n (0 to 7) at most,
 * even where this CPU could run better ones. */
#define GFRT_AT_MOST(n) (((uint32_t)(n) + 1) << 8)

/* Opens the bundle in folder `bundle`. `flags` is 0 or GFRT_VERIFY, GFRT_AT_MOST or both.
 * GFRT_NOT_FOUND, _DAMAGED, _TOO_NEW and _UNSUPPORTED tell what is wrong with the bundle, or with
 * this device for it. */
GFRT_API gfrt_status gfrt_open(const char *bundle, uint32_t flags, gfrt_model **model);

/* Closes the model once its last context is destroyed. Null is allowed. */
GFRT_API void gfrt_close(gfrt_model *model);

/* Which kernels it took: 0 are those for the least CPU that the bundle runs on. */
GFRT_API uint32_t gfrt_level(const gfrt_model *model);

/* "cpu", or "cuda: " and the GPU's name. */
GFRT_API const char *gfrt_device(const gfrt_model *model);

/* What goes in and comes out; GFRT_BAD_ARGUMENT for an index that there is not. */
GFRT_API size_t gfrt_input_count(const gfrt_model *model);
GFRT_API size_t gfrt_output_count(const gfrt_model *model);
GFRT_API gfrt_status gfrt_input_info(const gfrt_model *model, size_t index,
                                     gfrt_tensor_info *info);
GFRT_API gfrt_status gfrt_output_info(const gfrt_model *model, size_t index,
                                      gfrt_tensor_info *info);

/* Pixels to the input that the model was trained on: `pixels` is 8-bit RGB, row by row, as wide
 * and high as input `index`, image after image where it takes several; `input` gets its float32
 * NCHW, (x / 255 - mean) / std. Sizes are those of all images, and `input_size` four times the
 * other one; GFRT_BAD_ARGUMENT for others, and for an input that is no image. */
GFRT_API gfrt_status gfrt_normalize_u8(const gfrt_model *model, size_t index,
                                       const uint8_t *pixels, size_t pixels_size, float *input,
                                       size_t input_size);

/* `threads` kernels run on, up to 256: 1 is the calling thread alone, 0 one for each big CPU. The
 * results are the same for every number. A GPU needs one.
 *
 * Where there are LITTLE CPUs as well, which would hold the others up, threads of 0 stay on the big
 * ones; the calling thread does so during gfrt_run. */
GFRT_API gfrt_status gfrt_context_create(gfrt_model *model, uint32_t threads,
                                         gfrt_context **context);

/* Not while it runs. Null is allowed. */
GFRT_API void gfrt_context_destroy(gfrt_context *context);

/* Runs the model once: one pointer and one size in bytes for each input and each output, the
 * size that it has (GFRT_BAD_ARGUMENT for any other). A model compiled for a batch takes and gives
 * all of its images, one after the other. After a failure outputs hold nothing of use. */
GFRT_API gfrt_status gfrt_run(gfrt_context *context, const void *const inputs[],
                              const size_t input_sizes[], void *const outputs[],
                              const size_t output_sizes[]);

/* Called after each step of gfrt_run, once for each tensor that the step wrote. `label` says
 * which layer of the model the step belongs to. What `data` points to is overwritten later. */
typedef void (*gfrt_observer)(void *user, size_t step, const char *label,
                              const gfrt_tensor_info *tensor, const void *data);

/* Null takes the observer away. Neither this nor a profile may be changed while gfrt_run runs. */
GFRT_API gfrt_status gfrt_set_observer(gfrt_context *context, gfrt_observer observer, void *user);

/* Time spent in one step since the profile was enabled. */
typedef struct gfrt_step_profile {
    const char *kernel; /* these live as long as the model */
    const char *label;  /* the layer that the step belongs to */
    uint64_t calls;
    double seconds;     /* of all calls together */
} gfrt_step_profile;

/* Starts a profile from zero, or stops it. */
GFRT_API gfrt_status gfrt_profile_enable(gfrt_context *context, int enable);
GFRT_API size_t gfrt_step_count(const gfrt_model *model);
GFRT_API gfrt_status gfrt_profile_get(const gfrt_context *context, size_t step,
                                      gfrt_step_profile *profile);

#ifdef __cplusplus
}
#endif
#endif
