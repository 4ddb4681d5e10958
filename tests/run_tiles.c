/* Runs one of CODES over memory of its own: from the standard input, then to the output.
 *
 *     run_tiles WHICH NUMBER < before > after
 *
 * CODES, given by -D, lists assembly: CODE(number, text). It finds the address of the memory,
 * which is MEMORY, in rdi and NUMBER in rsi. Around the memory nothing is mapped.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIZE = 4096 };

int main(int argc, char **argv) {
  unsigned char *memory = mmap((void *)MEMORY, SIZE, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  if (argc != 3 || memory != (void *)MEMORY || fread(memory, 1, SIZE, stdin) != SIZE) return 2;
  syscall(SYS_arch_prctl, 0x1023, 18); /* where the CPU itself has tiles */
  long number = atol(argv[2]);
#define CODE(which, text)                                                                   \
  case which:                                                                               \
    __asm__ volatile(text : "+D"(memory), "+S"(number) : :                                  \
                     "rax", "rbx", "r12", "r13", "r15", "memory", "cc");                    \
    break;
  switch (atoi(argv[1])) {
    CODES
    default: return 2;
  }
  return fwrite((void *)MEMORY, 1, SIZE, stdout) == SIZE ? 0 : 2;
}
