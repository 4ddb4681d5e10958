/* A QEMU plugin that counts retired instructions and prints their number at the end.
 *
 * Distributions ship no header for plugins, so what is used of version 1 of their interface is
 * declared here; later versions keep it. */
#include <inttypes.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_info_t;

enum { ADD_U64 = 0 }; /* QEMU_PLUGIN_INLINE_ADD_U64 */

#define EXPORT __attribute__((visibility("default")))

extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id id,
                                                  void (*translated)(plugin_id,
                                                                     struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *block);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *block, int operation,
                                                     void *counter, uint64_t amount);
extern void qemu_plugin_register_atexit_cb(plugin_id id, void (*ended)(plugin_id, void *),
                                           void *user);
extern void qemu_plugin_outs(const char *text);

EXPORT int qemu_plugin_version = 1;

static uint64_t instructions;

static void on_translated(plugin_id id, struct qemu_plugin_tb *block) {
    (void)id;
    qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &instructions,
                                             qemu_plugin_tb_n_insns(block));
}

static void on_end(plugin_id id, void *user) {
    (void)id;
    (void)user;
    char text[64];
    snprintf(text, sizeof text, "instructions %" PRIu64 "\n", instructions);
    qemu_plugin_outs(text);
}

EXPORT int qemu_plugin_install(plugin_id id, const struct qemu_info_t *info, int argc,
                               char **argv) {
    (void)info;
    (void)argc;
    (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translated);
    qemu_plugin_register_atexit_cb(id, on_end, NULL);
    return 0;
}
