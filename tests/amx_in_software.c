/* The tile instructions of AMX in software, for a CPU that has the rest of the level.
 *
 * Preloaded into a program, it does those that our kernels are made of where they raise SIGILL
 * (Intel SDM, volume 1, chapter 18; volume 2 has the instructions). What it does not know, and
 * what AMX refuses too, kills the program by SIGILL as it would without.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/types.h>
#include <ucontext.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, LANES = ROW_BYTES / 4 };

typedef struct {
  int rows, row_bytes; /* 0: not configured */
  union {
    uint8_t bytes[ROWS][ROW_BYTES];
    uint32_t sums[ROWS][LANES];
  };
} Tile;

/* What lies in a tile beyond its rows and bytes cannot be read, so nothing clears it. */
static _Thread_local Tile tiles[TILES];

typedef struct {
  int prefix; /* none, 66, F3, F2 as VEX numbers them */
  int opcode, reg, rm, vvvv;
  bool in_memory, has_sib;
  uint8_t *address;
  int64_t index; /* scaled: between the rows of a tile, else part of the address */
  const uint8_t *next;
} Instruction;

enum { NONE, P66, F3, F2 };

static const int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};

/* ModRM, SIB and displacement, from `code` on. */
static bool decode_operand(const uint8_t *code, int vex, const greg_t *regs, Instruction *out) {
  const int modrm = *code++, mod = modrm >> 6, x = vex & 0x40 ? 0 : 8, b = vex & 0x20 ? 0 : 8;
  out->reg = modrm >> 3 & 7;
  out->rm = modrm & 7;
  out->in_memory = mod != 3;
  out->next = code;
  if (!out->in_memory) return (vex & 0x60) == 0x60;
  int base = out->rm;
  out->has_sib = base == 4;
  if (out->has_sib) {
    const int sib = *code++, index = (sib >> 3 & 7) | x;
    base = sib & 7;
    if (index != 4) out->index = (int64_t)((uint64_t)regs[REGISTERS[index]] << (sib >> 6));
  }
  int64_t address = 0, displacement_bytes = mod == 1 ? 1 : mod == 2 ? 4 : 0;
  if (base == 5 && mod == 0) {
    if (!out->has_sib) return false; /* relative to RIP: no kernel of ours has its operand there */
    displacement_bytes = 4;
  } else {
    address = regs[REGISTERS[base | b]];
  }
  if (displacement_bytes == 1) address += (int8_t)*code;
  if (displacement_bytes == 4) {
    int32_t displacement;
    memcpy(&displacement, code, sizeof displacement);
    address += displacement;
  }
  out->address = (uint8_t *)address;
  out->next = code + displacement_bytes;
  return true;
}

/* An instruction of VEX's map 0F38 without W, L or R: there is no tile above tmm7. */
static bool decode(const uint8_t *code, const greg_t *regs, Instruction *out) {
  if (code[0] != 0xC4 || (code[1] & 0x9F) != 0x82 || (code[2] & 0x84) != 0) return false;
  *out = (Instruction){.prefix = code[2] & 3, .opcode = code[3], .vvvv = ~(code[2] >> 3) & 15};
  return decode_operand(code + 4, code[1], regs, out);
}

static bool zero(const uint8_t *bytes, int count) {
  while (count > 0)
    if (bytes[--count]) return false;
  return true;
}

static bool configure(const uint8_t *config) {
  enum { ROW_BYTES_AT = 16, ROWS_AT = 48 };
  /* Palette 1, no row to resume from, nothing reserved. */
  if (config[0] != 1 || !zero(config + 1, 15)) return false;
  if (!zero(config + ROW_BYTES_AT + 2 * TILES, 16) || !zero(config + ROWS_AT + TILES, 8))
    return false;
  memset(tiles, 0, sizeof tiles);
  for (int i = 0; i < TILES; i++) {
    uint16_t row_bytes;
    memcpy(&row_bytes, config + ROW_BYTES_AT + 2 * i, sizeof row_bytes);
    const int rows = config[ROWS_AT + i];
    if (rows > ROWS || row_bytes > ROW_BYTES || !rows != !row_bytes) return false;
    tiles[i].rows = rows;
    tiles[i].row_bytes = row_bytes;
  }
  return true;
}

static bool configured(int tile) { return tile < TILES && tiles[tile].rows > 0; }

static bool multiply(int sums, int left, int right, bool left_signed, bool right_signed) {
  if (!configured(sums) || !configured(left) || !configured(right)) return false;
  if (sums == left || sums == right || left == right) return false;
  Tile *c = &tiles[sums];
  const Tile *a = &tiles[left], *b = &tiles[right];
  if (c->row_bytes % 4 || a->row_bytes % 4 || a->row_bytes / 4 != b->rows) return false;
  if (a->rows != c->rows || b->row_bytes != c->row_bytes) return false;
  for (int k = 0; k < b->rows; k++) {
    uint32_t wide[4][LANES];
    for (int n = 0; n < LANES; n++)
      for (int i = 0; i < 4; i++) {
        const uint8_t value = b->bytes[k][4 * n + i];
        wide[i][n] = right_signed ? (uint32_t)(int8_t)value : value;
      }
    for (int r = 0; r < c->rows; r++)
      for (int i = 0; i < 4; i++) {
        const uint8_t value = a->bytes[r][4 * k + i];
        const uint32_t times = left_signed ? (uint32_t)(int8_t)value : value;
        for (int n = 0; n < LANES; n++) c->sums[r][n] += times * wide[i][n];
      }
  }
  return true;
}

static bool move(const Instruction *in, bool load) {
  if (!in->has_sib || !configured(in->reg)) return false;
  Tile *tile = &tiles[in->reg];
  uint8_t *row = in->address;
  for (int r = 0; r < tile->rows; r++, row += in->index) {
    if (load)
      memcpy(tile->bytes[r], row, (size_t)tile->row_bytes);
    else
      memcpy(row, tile->bytes[r], (size_t)tile->row_bytes);
  }
  return true;
}

static bool clear(int tile) {
  memset(tiles[tile].bytes, 0, sizeof tiles[tile].bytes);
  return configured(tile);
}

static bool execute(const Instruction *in) {
  if (in->opcode == 0x5E)
    return !in->in_memory && multiply(in->reg, in->rm, in->vvvv, in->prefix & 2, in->prefix & 1);
  if (in->vvvv != 0) return false;
  if (in->opcode == 0x4B && in->in_memory && (in->prefix == F2 || in->prefix == F3))
    return move(in, in->prefix == F2);
  if (in->opcode != 0x49) return false;
  if (in->in_memory)
    return in->prefix == NONE && in->reg == 0 && configure(in->address + in->index);
  if (in->rm != 0) return false;
  if (in->prefix == F2) return clear(in->reg);
  if (in->prefix != NONE || in->reg != 0) return false;
  memset(tiles, 0, sizeof tiles); /* tilerelease */
  return true;
}

static void on_illegal(int number, siginfo_t *info, void *context) {
  (void)info;
  greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
  Instruction instruction;
  if (decode((const uint8_t *)regs[REG_RIP], regs, &instruction) && execute(&instruction)) {
    regs[REG_RIP] = (greg_t)instruction.next;
    return;
  }
  signal(number, SIG_DFL);
  raise(number); /* once this has returned: it is blocked until then */
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action = {.sa_sigaction = on_illegal, .sa_flags = SA_SIGINFO};
  sigaction(SIGILL, &action, NULL);
}
