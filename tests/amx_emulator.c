/* Carries out AMX instructions where the processor has none: a SIGILL handler decodes the one that trapped, does what the
 * Intel SDM says it does (vol. 2, TILELOADD, TDPBSSD, LDTILECFG ...) and continues after it. What the processor would
 * answer with #UD or #GP ends the process with a sentence. Tiles and their configuration belong to the thread. */

#define _GNU_SOURCE
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, MOST_ROWS = 16, MOST_BYTES = 64, CONFIG_BYTES = 64 };
enum prefix { NONE, P66, PF3, PF2 };
enum kind { LDTILECFG, STTILECFG, TILERELEASE, TILEZERO, TILELOADD, TILESTORED, TDPB, KINDS };

struct tile {
    uint8_t rows;
    uint16_t row_bytes;
    uint8_t data[MOST_ROWS][MOST_BYTES];
};

struct instruction {
    enum kind kind;
    enum prefix prefix;
    int length;
    int reg, rm, vvvv;      /* tile numbers */
    uintptr_t address;      /* of a memory operand; of its first row for tile loads and stores */
    intptr_t stride;        /* bytes from row to row */
};

static __thread struct tile tiles[TILES];
static __thread int is_configured;
static struct sigaction previous;

static _Atomic uint64_t counts[KINDS];
static uint64_t *trace;
static uint64_t trace_capacity;
static _Atomic uint64_t trace_length;

static void refuse(const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(text, sizeof text - 1, format, arguments);
    va_end(arguments);
    text[length++] = '\n';
    if (write(STDERR_FILENO, text, (size_t)length) < 0) _exit(1);
    abort();
}

/* Configuration */

static void load_configuration(const uint8_t *config) {
    if (config[0] > 1) refuse("ldtilecfg: palette %d, there are 0 and 1", config[0]);
    memset(tiles, 0, sizeof tiles);
    is_configured = config[0];
    if (!is_configured) return;
    for (int i = 1; i < CONFIG_BYTES; i++) {
        int is_shape = (i >= 16 && i < 16 + 2 * TILES) || (i >= 48 && i < 48 + TILES);
        if (!is_shape && config[i]) refuse("ldtilecfg: byte %d is %d, must be 0", i, config[i]);
    }
    for (int t = 0; t < TILES; t++) {
        int row_bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8, rows = config[48 + t];
        if (rows > MOST_ROWS || row_bytes > MOST_BYTES || !rows != !row_bytes)
            refuse("ldtilecfg: tile %d has %d rows of %d bytes, at most 16 of 64", t, rows, row_bytes);
        tiles[t].rows = (uint8_t)rows;
        tiles[t].row_bytes = (uint16_t)row_bytes;
    }
}

static void store_configuration(uint8_t *config) {
    memset(config, 0, CONFIG_BYTES);
    if (!is_configured) return;
    config[0] = 1;
    for (int t = 0; t < TILES; t++) {
        config[16 + 2 * t] = (uint8_t)tiles[t].row_bytes;
        config[48 + t] = tiles[t].rows;
    }
}

static struct tile *configured(const char *name, int number) {
    if (!is_configured) refuse("%s: tiles are not configured", name);
    if (!tiles[number].rows) refuse("%s: tile %d is not configured", name, number);
    return &tiles[number];
}

/* Instructions on tiles */

static void zero_tile(int number) {
    memset(configured("tilezero", number)->data, 0, sizeof tiles[number].data);
}

static void load_tile(const struct instruction *found) {
    struct tile *tile = configured("tileloadd", found->reg);
    memset(tile->data, 0, sizeof tile->data);
    for (int row = 0; row < tile->rows; row++)
        memcpy(tile->data[row], (const uint8_t *)found->address + row * found->stride, tile->row_bytes);
    uint64_t place = trace ? atomic_fetch_add(&trace_length, 1) : 0;
    if (place < trace_capacity) trace[place] = found->address;
}

static void store_tile(const struct instruction *found) {
    const struct tile *tile = configured("tilestored", found->reg);
    for (int row = 0; row < tile->rows; row++)
        memcpy((uint8_t *)found->address + row * found->stride, tile->data[row], tile->row_bytes);
}

static int32_t widened(uint8_t byte, int is_signed) { return is_signed ? (int8_t)byte : byte; }

static void check_product(int c, int a, int b) {
    const struct tile *sums = configured("tdpb", c), *left = configured("tdpb", a), *right = configured("tdpb", b);
    if (c == a || a == b || c == b) refuse("tdpb: tiles %d, %d and %d are not distinct", c, a, b);
    if (sums->row_bytes % 4 || left->row_bytes % 4) refuse("tdpb: tiles %d and %d have parts of lanes", c, a);
    if (sums->rows != left->rows || sums->row_bytes != right->row_bytes || left->row_bytes / 4 != right->rows)
        refuse("tdpb: sums of %d x %d bytes are not the product of %d x %d and %d x %d", sums->rows, sums->row_bytes,
               left->rows, left->row_bytes, right->rows, right->row_bytes);
}

/* sums[m][n] += sum over k and b of left[m][4k + b] * right[k][4n + b], modulo 2^32 */
static void multiply(int c, int a, int b, int is_left_signed, int is_right_signed) {
    check_product(c, a, b);
    for (int m = 0; m < tiles[c].rows; m++)
        for (int n = 0; n < tiles[c].row_bytes / 4; n++) {
            uint32_t sum;
            memcpy(&sum, &tiles[c].data[m][4 * n], 4);
            for (int k = 0; k < tiles[b].rows; k++)
                for (int i = 0; i < 4; i++)
                    sum += (uint32_t)(widened(tiles[a].data[m][4 * k + i], is_left_signed) *
                                      widened(tiles[b].data[k][4 * n + i], is_right_signed));
            memcpy(&tiles[c].data[m][4 * n], &sum, 4);
        }
    memset(tiles[c].data[tiles[c].rows], 0, (size_t)(MOST_ROWS - tiles[c].rows) * MOST_BYTES);
}

static void execute(const struct instruction *found) {
    switch (found->kind) {
    case LDTILECFG: load_configuration((const uint8_t *)found->address); break;
    case STTILECFG: store_configuration((uint8_t *)found->address); break;
    case TILERELEASE:
        memset(tiles, 0, sizeof tiles);
        is_configured = 0;
        break;
    case TILEZERO: zero_tile(found->reg); break;
    case TILELOADD: load_tile(found); break;
    case TILESTORED: store_tile(found); break;
    default: multiply(found->reg, found->rm, found->vvvv, found->prefix >= PF3, found->prefix == PF2 || found->prefix == P66);
    }
    atomic_fetch_add(&counts[found->kind], 1);
}

/* Decoding: C4 [R X B 00010] [W vvvv L pp] opcode ModRM [SIB] [displacement] */

static uintptr_t register_value(const greg_t *registers, int number) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uintptr_t)registers[places[number]];
}

/* Reads ModRM's memory operand; the index register counts as the stride of rows. */
static void decode_memory(const uint8_t *code, const greg_t *registers, struct instruction *found) {
    const uint8_t *next = code + 5;
    int mod = code[4] >> 6, base = code[4] & 7, high_base = code[1] & 0x20 ? 0 : 8, high_index = code[1] & 0x40 ? 0 : 8;
    if (base == 4) {
        int index = (*next >> 3 & 7) | high_index;
        if (index != 4) found->stride = (intptr_t)(register_value(registers, index) << (*next >> 6));
        base = *next++ & 7;
    }
    int is_absolute = mod == 0 && base == 5;
    uintptr_t start = is_absolute ? 0 : register_value(registers, base | high_base);
    int32_t wide = 0;
    if (mod == 1) wide = (int8_t)*next++;
    if (mod == 2 || is_absolute) {
        memcpy(&wide, next, 4);
        next += 4;
    }
    found->length = (int)(next - code);
    if (is_absolute && (code[4] & 7) == 5) start = (uintptr_t)code + (uintptr_t)found->length;
    found->address = start + (uintptr_t)(intptr_t)wide;
}

/* Returns the kind of an AMX instruction, or KINDS for any other one. */
static enum kind kind_of(enum prefix prefix, int opcode, int modrm) {
    int is_memory = modrm < 0xC0, has_sib = is_memory && (modrm & 7) == 4, reg = modrm >> 3 & 7;
    if (opcode == 0x49 && is_memory && reg == 0 && prefix == NONE) return LDTILECFG;
    if (opcode == 0x49 && is_memory && reg == 0 && prefix == P66) return STTILECFG;
    if (opcode == 0x49 && modrm == 0xC0 && prefix == NONE) return TILERELEASE;
    if (opcode == 0x49 && !is_memory && (modrm & 7) == 0 && prefix == PF2) return TILEZERO;
    if (opcode == 0x4B && has_sib && (prefix == PF2 || prefix == P66)) return TILELOADD;
    if (opcode == 0x4B && has_sib && prefix == PF3) return TILESTORED;
    if (opcode == 0x5E && !is_memory) return TDPB;
    return KINDS;
}

static int decode(const uint8_t *code, const greg_t *registers, struct instruction *found) {
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || code[2] & 0x84) return 0; /* map 0F38, W0, 128 bits */
    *found = (struct instruction){.prefix = code[2] & 3, .length = 5, .reg = code[4] >> 3 & 7, .rm = code[4] & 7};
    found->vvvv = ~code[2] >> 3 & 15;
    found->kind = kind_of(found->prefix, code[3], code[4]);
    if (found->kind == KINDS || !(code[1] & 0x80)) return 0; /* tile 8 or higher */
    if (found->kind == TDPB) return found->vvvv < TILES && code[1] & 0x20;
    if (code[4] < 0xC0) decode_memory(code, registers, found);
    return found->vvvv == 0;
}

static void on_illegal_instruction(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    struct instruction found;
    if (!decode((const uint8_t *)registers[REG_RIP], registers, &found)) {
        sigaction(SIGILL, &previous, NULL); /* not ours: it traps again, for whoever was there before */
        return;
    }
    execute(&found);
    registers[REG_RIP] += found.length;
}

/* What tests call */

/* Returns 0, or -1 where the handler could not be installed. */
int amx_install(void) {
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
    return sigaction(SIGILL, &action, &previous);
}

/* Counts from 0 again and writes the addresses of tile loads to `addresses`, as many as there is room for. */
void amx_watch(uint64_t *addresses, uint64_t capacity) {
    memset(counts, 0, sizeof counts);
    atomic_store(&trace_length, 0);
    trace = addresses;
    trace_capacity = capacity;
}

/* Returns how often a kind of instruction was carried out since amx_watch. */
uint64_t amx_count(int kind) { return atomic_load(&counts[kind]); }
