/* Prints the likeliest class of an image that has the size of the model's input (binary PPM).
 * Build beside a bundle:  cc -I bundle classify.c bundle/libMODEL.so -Wl,-rpath,bundle -o classify
 * Run:  ffmpeg -i photo.jpg -vf scale=256:256:force_original_aspect_ratio=increase,crop=224:224 \
 *           photo.ppm && ./classify bundle photo.ppm
 */
#include <gfrt.h>
#include <stdio.h>
#include <stdlib.h>

static void check(gfrt_status status) {
    if (status != GFRT_OK)
        exit(fprintf(stderr, "%s\n", gfrt_last_error()) > 0);
}

int main(int argc, char **argv) {
    gfrt_model *model;
    gfrt_context *context;
    gfrt_tensor_info in, out;
    if (argc != 3)
        return fprintf(stderr, "usage: classify BUNDLE IMAGE.ppm\n"), 2;
    check(gfrt_open(argv[1], 0, &model));
    check(gfrt_context_create(model, 1, &context));
    check(gfrt_input_info(model, 0, &in));
    check(gfrt_output_info(model, 0, &out));

    size_t size = in.size_bytes / sizeof(float), best = 0;
    unsigned char *pixels = malloc(size);
    float *input = malloc(in.size_bytes), *logits = malloc(out.size_bytes);
    int width = 0, height = 0;
    FILE *file = fopen(argv[2], "rb");
    if (!file || fscanf(file, "P6 %d %d 255%*c", &width, &height) != 2 || height != in.shape[2] ||
        width != in.shape[3] || fread(pixels, 1, size, file) != size)
        return fprintf(stderr, "%s is no PPM of the input's size\n", argv[2]), 1;
    check(gfrt_normalize_u8(model, 0, pixels, size, input, in.size_bytes));
    check(gfrt_run(context, (const void *[]){input}, &in.size_bytes, (void *[]){logits},
                   &out.size_bytes));
    for (size_t i = 1; i < out.size_bytes / sizeof(float); i++)
        best = logits[i] > logits[best] ? i : best;
    printf("class %zu, logit %.6f\n", best, logits[best]);
    gfrt_context_destroy(context);
    gfrt_close(model);
    return 0;
}
