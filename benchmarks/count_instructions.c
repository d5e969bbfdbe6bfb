/* A plugin of QEMU's user emulators that counts the instructions which a program executes, and prints the sum at its end.
   Declares the few functions that it calls itself, as distributions ship no header for them.
   Build: cc -shared -fPIC -O2 count_instructions.c -o count_instructions.so
   Use:   qemu-aarch64 -plugin ./count_instructions.so -d plugin PROGRAM */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

struct qemu_plugin_tb;
enum { NO_REGISTERS = 0 };
extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int, void *);
extern void qemu_plugin_register_atexit_cb(uint64_t, void (*)(uint64_t, void *), void *);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_outs(const char *);

int qemu_plugin_version = 1;
static uint64_t executed;

static void block_runs(unsigned cpu, void *instructions) {
  (void)cpu;
  executed += (uintptr_t)instructions;
}

static void block_is_translated(uint64_t id, struct qemu_plugin_tb *block) {
  (void)id;
  void *instructions = (void *)(uintptr_t)qemu_plugin_tb_n_insns(block);
  qemu_plugin_register_vcpu_tb_exec_cb(block, block_runs, NO_REGISTERS, instructions);
}

static void program_ends(uint64_t id, void *unused) {
  char line[64];
  (void)id, (void)unused;
  snprintf(line, sizeof line, "instructions %" PRIu64 "\n", executed);
  qemu_plugin_outs(line);
}

int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, block_is_translated);
  qemu_plugin_register_atexit_cb(id, program_ends, NULL);
  return 0;
}
