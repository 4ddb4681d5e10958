/* Opens a bundle once for each plan.bin that follows on standard input (u32 size, bytes) and prints
 * a line for each: the status and the message. What opens is described, given a context, and
 * closed. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "gfrt.h"

static void describe(gfrt_model *model) {
    gfrt_tensor_info info;
    for (size_t i = 0; i < gfrt_input_count(model); i++)
        gfrt_input_info(model, i, &info);
    for (size_t i = 0; i < gfrt_output_count(model); i++)
        gfrt_output_info(model, i, &info);
    gfrt_context *context;
    if (gfrt_context_create(model, 1, &context) != GFRT_OK)
        return;
    gfrt_step_profile profile;
    for (size_t i = 0; i < gfrt_step_count(model); i++)
        gfrt_profile_get(context, i, &profile);
    gfrt_context_destroy(context);
}

int main(int argc, char **argv) {
    uint32_t size;
    if (argc != 3)
        return 2;
    while (fread(&size, sizeof size, 1, stdin) == 1) {
        char *plan = malloc(size + 1);
        if (!plan || fread(plan, 1, size, stdin) != size)
            return 2;
        FILE *file = fopen(argv[2], "wb");
        if (!file || fwrite(plan, 1, size, file) != size || fclose(file) != 0)
            return 2;
        free(plan);
        gfrt_model *model = NULL;
        gfrt_status status = gfrt_open(argv[1], 0, &model);
        printf("%d %s\n", status, status ? gfrt_last_error() : "");
        if (status == GFRT_OK)
            describe(model);
        gfrt_close(model);
    }
    return 0;
}
